/* Round trips and posts on a Unix socket that keep the GIL for a short time.
 *
 * Python's socket calls release the GIL at once, four times a round trip, and each time a busy thread may keep it for 5 ms
 * (the interpreter's switch interval): beside vLLM's input thread a lookup that the server answered in 0.1 ms took 18 ms.
 * So these functions wait with the GIL for as long as servers usually take, and release it only after that.
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

/* Sends the rest of the request and, if there is a buffer, receives once. Returns the bytes received; -1 with errno, ETIMEDOUT at
 * the deadline. */
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
    if (!buffer)
        return 0;
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

/* Takes the steps with the GIL until `hold` has passed, and then without it. Returns as `step`; -1 with a Python error set. */
static ssize_t carry_out(const int64_t n[3], const char *rest, size_t left, char *buffer)
{
    int fd = (int)n[0];
    long long begin = now_us(), deadline = begin + n[2], held = begin + n[1];
    ssize_t got = step(fd, &rest, &left, buffer, held < deadline ? held : deadline);
    while (got < 0 && (errno == EINTR || (errno == ETIMEDOUT && now_us() < deadline))) {
        int error;
        if (PyErr_CheckSignals() < 0)
            return -1;
        Py_BEGIN_ALLOW_THREADS
        got = step(fd, &rest, &left, buffer, deadline);
        error = errno;
        Py_END_ALLOW_THREADS
        errno = error;
    }
    if (got < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    return got;
}

/* Does the work of both functions: sends the request, and returns what arrives then (`answered`) or what had arrived before. */
static PyObject *talk(PyObject *const *args, Py_ssize_t nargs, int answered)
{
    char *request, buffer[BUFFER_BYTES];
    Py_ssize_t size;
    ssize_t early = 0;
    int64_t n[3]; /* the descriptor, and the microseconds of `hold` and `timeout` */
    if (nargs != 4)
        return PyErr_Format(PyExc_TypeError, "%zd arguments given, 4 wanted", nargs);
    PyObject *const integers[3] = {args[0], args[2], args[3]};
    if (PyBytes_AsStringAndSize(args[1], &request, &size) < 0 || lmcache_integers("it", integers, 3, n, 3) < 0)
        return NULL;
    if (!answered)
        early = recv((int)n[0], buffer, BUFFER_BYTES, MSG_DONTWAIT);
    if (early < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
        return PyErr_SetFromErrno(PyExc_OSError);
    ssize_t got = carry_out(n, request, (size_t)size, answered ? buffer : NULL);
    if (got < 0)
        return NULL;
    return PyBytes_FromStringAndSize(buffer, answered ? got : early < 0 ? 0 : early);
}

static PyObject *exchange(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    return talk(args, nargs, 1);
}

static PyObject *post(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    return talk(args, nargs, 0);
}

#define SEVERAL(name) #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL

PyMethodDef lmcache_exchange_methods[] = {
    {SEVERAL(exchange),
     "exchange(fd, request, hold_us, timeout_us) -> bytes\n\n"
     "Send all of `request` on the socket and return the bytes that arrive first, at most 64 KiB; b\"\" when the other side has\n"
     "hung up. The GIL is kept for `hold_us` microseconds. Raise TimeoutError after `timeout_us`, OSError for other errors."},
    {SEVERAL(post),
     "post(fd, request, hold_us, timeout_us) -> bytes\n\n"
     "Send all of `request` as `exchange` does, and return what had arrived before, at most 64 KiB; b\"\" if nothing had."},
    {NULL, NULL, 0, NULL},
};
