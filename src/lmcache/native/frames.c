/* Reads large frames of a disk tier (`tiers/disk/segments.py`) and computes their checksums, in one call without the GIL.
 *
 * From Python each shard costs two releases of the GIL, which other reading threads and the server's loop compete for: shards
 * of 0.5 MiB came from the sector cache at half the rate and took twice the CPU time. A piece's checksum is computed while the
 * piece is in the cache of the core that has just read it.
 */
#define _GNU_SOURCE
#include "native.h"
#include "xxh3.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>

enum { DISK_BLOCK = 4096, HEADER_BYTES = 128, CHECKED_BYTES = 112, END_BYTES = 2 * DISK_BLOCK, GROUP_FRAMES = 32 };
enum { SHORT = -1 }; /* the file ends before the frame does */

/* A frame: its payload from `offset` on, then, at the next block boundary, a block that begins with the header. */
typedef struct {
    int64_t offset, payload_bytes;
    uint8_t *into;
} Frame;

typedef struct {
    int64_t error; /* 0, SHORT or errno */
    uint8_t header[HEADER_BYTES], digest[16];
} Outcome;

static int64_t whole_blocks(int64_t bytes)
{
    return bytes / DISK_BLOCK * DISK_BLOCK;
}

/* Returns the bytes of a frame after the complete blocks of its payload. */
static int64_t end_bytes(const Frame *frame)
{
    return frame->payload_bytes % DISK_BLOCK ? END_BYTES : DISK_BLOCK;
}

/* Fills all buffers. Returns 0, SHORT or errno. */
static int64_t fill(int fd, struct iovec *buffers, int count, int64_t offset)
{
    while (count) {
        ssize_t got = preadv(fd, buffers, count, offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? errno : SHORT;
        offset += got;
        for (; count && (size_t)got >= buffers->iov_len; buffers++, count--)
            got -= (ssize_t)buffers->iov_len;
        if (got) {
            buffers->iov_base = (char *)buffers->iov_base + got;
            buffers->iov_len -= (size_t)got;
        }
    }
    return 0;
}

/* Finishes a frame whose complete payload blocks are in `acc` already. `end` holds the bytes that follow them in the file. */
static void finish(const Frame *frame, uint64_t *acc, uint8_t *end, Outcome *outcome)
{
    int64_t whole = whole_blocks(frame->payload_bytes), tail = frame->payload_bytes - whole;
    memcpy(frame->into + whole, end, (size_t)tail);
    memcpy(outcome->header, end + (tail ? DISK_BLOCK : 0), HEADER_BYTES);
    memmove(end + tail, outcome->header, CHECKED_BYTES);
    xxh3_end(acc, end, tail + CHECKED_BYTES, (uint64_t)frame->payload_bytes + CHECKED_BYTES, outcome->digest);
}

/* Reads one frame, `piece` bytes at a time. */
static void read_one(int fd, const Frame *frame, int64_t piece, uint8_t *end, Outcome *outcome)
{
    int64_t whole = whole_blocks(frame->payload_bytes), at = 0;
    Lanes acc;
    xxh3_begin(acc);
    while (at < whole) {
        int64_t size = whole - at < piece ? whole - at : piece;
        struct iovec buffers[2] = {{frame->into + at, (size_t)size}, {end, (size_t)end_bytes(frame)}};
        outcome->error = fill(fd, buffers, at + size == whole ? 2 : 1, frame->offset + at);
        if (outcome->error)
            return;
        xxh3_blocks(acc, frame->into + at, size / XXH3_BLOCK);
        at += size;
    }
    finish(frame, acc, end, outcome);
}

/* Returns how many frames, from the first on, are adjacent in the file and can be read at once. */
static int group_of(const Frame *frames, int64_t count, int64_t piece)
{
    int group = 1;
    int64_t bytes = frames[0].payload_bytes;
    while (group < count && group < GROUP_FRAMES) {
        const Frame *last = &frames[group - 1];
        bytes += frames[group].payload_bytes;
        if (bytes > piece || frames[group].offset != last->offset + whole_blocks(last->payload_bytes) + end_bytes(last))
            break;
        group++;
    }
    return group;
}

static void read_group(int fd, const Frame *frames, int count, int64_t piece, uint8_t *ends, Outcome *outcomes)
{
    if (count > 1) {
        struct iovec buffers[2 * GROUP_FRAMES];
        for (int i = 0; i < count; i++) {
            buffers[2 * i] = (struct iovec){frames[i].into, (size_t)whole_blocks(frames[i].payload_bytes)};
            buffers[2 * i + 1] = (struct iovec){ends + i * END_BYTES, (size_t)end_bytes(&frames[i])};
        }
        if (!fill(fd, buffers, 2 * count, frames[0].offset)) {
            for (int i = 0; i < count; i++) {
                Lanes acc;
                xxh3_begin(acc);
                xxh3_blocks(acc, frames[i].into, whole_blocks(frames[i].payload_bytes) / XXH3_BLOCK);
                finish(&frames[i], acc, ends + i * END_BYTES, &outcomes[i]);
            }
            return;
        }
    }
    for (int i = 0; i < count; i++) /* a single frame, or a group that cannot be read at once */
        read_one(fd, &frames[i], piece, ends, &outcomes[i]);
}

static PyObject *read_frames(PyObject *module, PyObject *args)
{
    int fd;
    const char *given;
    Py_ssize_t size;
    long long piece;
    (void)module;
    if (!PyArg_ParseTuple(args, "iy#L:read_frames", &fd, &given, &size, &piece))
        return NULL;
    int64_t count = size / (Py_ssize_t)sizeof(Frame);
    const Frame *frames = (const Frame *)(const void *)given;
    if (size % (Py_ssize_t)sizeof(Frame) || piece < DISK_BLOCK || piece % DISK_BLOCK) {
        PyErr_SetString(PyExc_ValueError, "read_frames: frames is truncated, or piece_bytes is not a multiple of 4096");
        return NULL;
    }
    for (int64_t i = 0; i < count; i++)
        if (frames[i].payload_bytes < DISK_BLOCK) {
            PyErr_SetString(PyExc_ValueError, "read_frames: a payload is shorter than 4096 bytes");
            return NULL;
        }
    PyObject *told = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(Outcome));
    if (told == NULL)
        return NULL;
    uint8_t *ends = aligned_alloc(DISK_BLOCK, GROUP_FRAMES * END_BYTES);
    if (ends == NULL) {
        Py_DECREF(told);
        return PyErr_NoMemory();
    }
    Outcome *outcomes = (Outcome *)(void *)PyBytes_AsString(told);
    Py_BEGIN_ALLOW_THREADS
    memset(outcomes, 0, (size_t)count * sizeof(Outcome));
    for (int64_t i = 0, group; i < count; i += group) {
        group = group_of(frames + i, count - i, piece);
        read_group(fd, frames + i, (int)group, piece, ends, outcomes + i);
    }
    Py_END_ALLOW_THREADS
    free(ends);
    return told;
}

PyMethodDef lmcache_frames_methods[] = {
    {"read_frames", read_frames, METH_VARARGS,
     "read_frames(fd, frames, piece_bytes) -> bytes\n\n"
     "Read frames and their checksums. frames: for each, int64 offset, int64 payload bytes (4096 or more) and uint64 target\n"
     "address, whose memory the caller keeps alive. At most piece_bytes of payload, complete blocks of 4096, are read at once.\n"
     "The result has for each frame int64 0, -1 where the file ends too early, or errno; the 128 bytes of its header; and the\n"
     "big-endian XXH3-128 of the payload and the header's first 112 bytes."},
    {NULL, NULL, 0, NULL},
};
