/* One round trip on a Unix socket that keeps the GIL for a short time.
 *
 * Python's socket calls release the GIL at once, four times a round trip, and each time a busy thread may keep it for 5 ms
 * (the interpreter's switch interval): beside vLLM's input thread a lookup that the server answered in 0.1 ms took 18 ms.
 * So this function waits with the GIL for as long as servers usually take, and releases it only after that.
 */
#include "native.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

enum { BUFFER_BYTES = 1 << 16 };

static long long now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Waits until `deadline` for an event. Returns 1 when it has happened, 0 at the deadline, -1 with errno. */
static int await_event(int fd, short event, long long deadline)
{
    long long left = deadline - now_us();
    if (left < 0)
        left = 0;
    struct timespec rest = {(time_t)(left / 1000000), (long)(left % 1000000) * 1000};
    struct pollfd one = {fd, event, 0};
    return ppoll(&one, 1, &rest, NULL);
}

/* Sends the rest of the request, then receives once. Returns the bytes received; -1 with errno, ETIMEDOUT at the deadline. */
static ssize_t step(int fd, const char **rest, size_t *left, char *buffer, long long deadline)
{
    while (*left) {
        ssize_t sent = send(fd, *rest, *left, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            *rest += sent;
            *left -= (size_t)sent;
        } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
            return -1;
        } else {
            int ready = await_event(fd, POLLOUT, deadline);
            if (ready <= 0) {
                errno = ready ? errno : ETIMEDOUT;
                return -1;
            }
        }
    }
    for (;;) {
        int ready = await_event(fd, POLLIN, deadline);
        if (ready <= 0) {
            errno = ready ? errno : ETIMEDOUT;
            return -1;
        }
        ssize_t got = recv(fd, buffer, BUFFER_BYTES, MSG_DONTWAIT);
        if (got >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
            return got;
    }
}

static PyObject *exchange(PyObject *module, PyObject *args)
{
    int fd;
    const char *rest;
    Py_ssize_t size;
    long long hold, timeout;
    char buffer[BUFFER_BYTES];
    (void)module;
    if (!PyArg_ParseTuple(args, "iy#LL:exchange", &fd, &rest, &size, &hold, &timeout))
        return NULL;
    size_t left = (size_t)size;
    long long begin = now_us(), deadline = begin + timeout, held = begin + hold;
    ssize_t got = step(fd, &rest, &left, buffer, held < deadline ? held : deadline);
    while (got < 0 && (errno == EINTR || (errno == ETIMEDOUT && now_us() < deadline))) {
        int error;
        if (PyErr_CheckSignals() < 0)
            return NULL;
        Py_BEGIN_ALLOW_THREADS
        got = step(fd, &rest, &left, buffer, deadline);
        error = errno;
        Py_END_ALLOW_THREADS
        errno = error;
    }
    if (got < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyBytes_FromStringAndSize(buffer, got);
}

PyMethodDef lmcache_exchange_methods[] = {
    {"exchange", exchange, METH_VARARGS,
     "exchange(fd, request, hold_us, timeout_us) -> bytes\n\n"
     "Send all of `request` on the socket and return the bytes that arrive first, at most 64 KiB; b\"\" when the other side has\n"
     "hung up. The GIL is kept for `hold_us` microseconds. Raise TimeoutError after `timeout_us`, OSError for other errors."},
    {NULL, NULL, 0, NULL},
};
