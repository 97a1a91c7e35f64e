/* The codec `pack12` (docs/codecs.md): bfloat16 values in 12 bits, without loss.
 *
 * KV of one block lies within a small range of exponents, so 4 bits below the largest one say the exponent, and 8 bits are sign and
 * mantissa. The stream of n values has the base of each complete block of 64 (a byte: its largest exponent, or AS_IT_IS), then the
 * bodies of these blocks, then what is left of the raw bytes:
 *
 *     base 0..254   64 bytes of sign and mantissa, then 32 bytes of codes: byte i has value i in its lower half, i + 32 in its upper.
 *                   Code 0..14: the exponent is base - code. Code 15: it is 0 (zeros and subnormal numbers).
 *     AS_IT_IS      the 128 raw bytes
 *
 * All bases come first, so that the length of a stream is known, and compared with the bytes that there are, before anything is
 * decoded. The loops are plain C; compilers vectorize them, and x86-64 has a second copy for AVX2, chosen at run time.
 */
#include "native.h"

#include <string.h>

#define INLINED static inline __attribute__((always_inline))

enum { BLOCK = 64, HALF = BLOCK / 2, BLOCK_BYTES = 2 * BLOCK, PACKED_BYTES = BLOCK + HALF, AS_IT_IS = 255, IS_ZERO = 15 };

/* Values of a payload, which may lie anywhere. */
typedef uint16_t __attribute__((aligned(1), may_alias)) Value;

/* Packs one block into `body`, which has room for PACKED_BYTES. Returns its base, or AS_IT_IS if its exponents do not fit. */
INLINED int pack_block(const Value *restrict values, uint8_t *restrict body)
{
    uint8_t exponents[BLOCK], below[BLOCK], codes[BLOCK], largest = 0, farthest = 0;
    for (int i = 0; i < BLOCK; i++) {
        exponents[i] = (uint8_t)(values[i] >> 7);
        body[i] = (uint8_t)((values[i] & 0x7f) | (values[i] >> 8 & 0x80));
    }
    for (int i = 0; i < BLOCK; i++)
        largest = exponents[i] > largest ? exponents[i] : largest;
    for (int i = 0; i < BLOCK; i++)
        below[i] = exponents[i] ? (uint8_t)(largest - exponents[i]) : 0;
    for (int i = 0; i < BLOCK; i++)
        farthest = below[i] > farthest ? below[i] : farthest;
    for (int i = 0; i < BLOCK; i++)
        codes[i] = exponents[i] ? below[i] : IS_ZERO;
    for (int i = 0; i < HALF; i++)
        body[BLOCK + i] = (uint8_t)((codes[i] & 15) | codes[i + HALF] << 4);
    return farthest < IS_ZERO ? largest : AS_IT_IS;
}

INLINED void unpack_block(int base, const uint8_t *restrict body, Value *restrict values)
{
    for (int i = 0; i < HALF; i++) {
        uint16_t a = body[BLOCK + i] & 15, b = body[BLOCK + i] >> 4;
        uint16_t low = a == IS_ZERO ? 0 : (uint16_t)(base - a) & 255, high = b == IS_ZERO ? 0 : (uint16_t)(base - b) & 255;
        uint16_t first = body[i], second = body[i + HALF];
        values[i] = (uint16_t)((first & 0x7f) | (first & 0x80) << 8 | low << 7);
        values[i + HALF] = (uint16_t)((second & 0x7f) | (second & 0x80) << 8 | high << 7);
    }
}

/* Returns the bytes of the stream, or 0 if `room` may not suffice. */
INLINED int64_t pack(const uint8_t *raw, int64_t raw_bytes, uint8_t *stream, int64_t room)
{
    int64_t blocks = raw_bytes / BLOCK_BYTES, rest = raw_bytes % BLOCK_BYTES;
    uint8_t *to = stream + blocks, *end = stream + room;
    if (blocks > room)
        return 0;
    for (int64_t i = 0; i < blocks; i++, raw += BLOCK_BYTES) {
        if (end - to < BLOCK_BYTES)
            return 0;
        int base = pack_block((const Value *)(const void *)raw, to);
        if (base == AS_IT_IS)
            memcpy(to, raw, BLOCK_BYTES);
        stream[i] = (uint8_t)base;
        to += base == AS_IT_IS ? BLOCK_BYTES : PACKED_BYTES;
    }
    if (end - to < rest)
        return 0;
    memcpy(to, raw, (size_t)rest);
    return to + rest - stream;
}

/* Returns whether the stream is one of `raw_bytes` bytes. */
INLINED int is_stream(const uint8_t *stream, int64_t stream_bytes, int64_t raw_bytes)
{
    int64_t blocks = raw_bytes / BLOCK_BYTES, as_they_are = 0;
    if (blocks > stream_bytes)
        return 0;
    for (int64_t i = 0; i < blocks; i++)
        as_they_are += stream[i] == AS_IT_IS;
    return stream_bytes
           == blocks * (1 + PACKED_BYTES) + as_they_are * (BLOCK_BYTES - PACKED_BYTES) + raw_bytes % BLOCK_BYTES;
}

/* Unpacks the bodies of `blocks` blocks. */
INLINED void unpack_blocks(const uint8_t *bases, const uint8_t *bodies, int64_t blocks, uint8_t *raw)
{
    for (int64_t i = 0; i < blocks; i++, raw += BLOCK_BYTES) {
        if (bases[i] == AS_IT_IS) {
            memcpy(raw, bodies, BLOCK_BYTES);
            bodies += BLOCK_BYTES;
        } else {
            unpack_block(bases[i], bodies, (Value *)(void *)raw);
            bodies += PACKED_BYTES;
        }
    }
}

/* Unpacks a stream that lies elsewhere. Returns whether it is one of `raw_bytes` bytes; if not, writes nothing. */
INLINED int unpack(const uint8_t *stream, int64_t stream_bytes, uint8_t *raw, int64_t raw_bytes)
{
    int64_t blocks = raw_bytes / BLOCK_BYTES, rest = raw_bytes % BLOCK_BYTES;
    if (!is_stream(stream, stream_bytes, raw_bytes))
        return 0;
    unpack_blocks(stream, stream + blocks, blocks, raw);
    memcpy(raw + raw_bytes - rest, stream + stream_bytes - rest, (size_t)rest);
    return 1;
}

/* Unpacks a stream that lies at the beginning of `raw`, from its end on: there are fewer bytes before a body than before what it
 * becomes, but for the bases and the first few blocks, which pass through `scratch`, of at least `stream_bytes`. */
INLINED int unpack_in_place(uint8_t *raw, int64_t stream_bytes, int64_t raw_bytes, uint8_t *scratch)
{
    int64_t blocks = raw_bytes / BLOCK_BYTES, rest = raw_bytes % BLOCK_BYTES, left = blocks, end = stream_bytes - rest;
    if (stream_bytes > raw_bytes || !is_stream(raw, stream_bytes, raw_bytes))
        return 0;
    memcpy(scratch, raw, (size_t)blocks);
    memmove(raw + raw_bytes - rest, raw + end, (size_t)rest);
    while (left) {
        int base = scratch[left - 1];
        int64_t begin = end - (base == AS_IT_IS ? BLOCK_BYTES : PACKED_BYTES), to = (left - 1) * BLOCK_BYTES;
        if (begin > to)
            break;
        uint8_t body[BLOCK_BYTES];
        memcpy(body, raw + begin, base == AS_IT_IS ? BLOCK_BYTES : PACKED_BYTES);
        if (base == AS_IT_IS)
            memcpy(raw + to, body, BLOCK_BYTES);
        else
            unpack_block(base, body, (Value *)(void *)(raw + to));
        end = begin;
        left--;
    }
    memcpy(scratch + blocks, raw + blocks, (size_t)(end - blocks));
    unpack_blocks(scratch, scratch + blocks, left, raw);
    return 1;
}

static int64_t pack_plain(const uint8_t *raw, int64_t raw_bytes, uint8_t *stream, int64_t room)
{
    return pack(raw, raw_bytes, stream, room);
}

static int unpack_plain(const uint8_t *stream, int64_t stream_bytes, uint8_t *raw, int64_t raw_bytes, uint8_t *scratch)
{
    return stream == raw ? unpack_in_place(raw, stream_bytes, raw_bytes, scratch) : unpack(stream, stream_bytes, raw, raw_bytes);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static int64_t pack_avx2(const uint8_t *raw, int64_t raw_bytes, uint8_t *stream, int64_t room)
{
    return pack(raw, raw_bytes, stream, room);
}

__attribute__((target("avx2"))) static int unpack_avx2(const uint8_t *stream, int64_t stream_bytes, uint8_t *raw, int64_t raw_bytes,
                                                       uint8_t *scratch)
{
    return stream == raw ? unpack_in_place(raw, stream_bytes, raw_bytes, scratch) : unpack(stream, stream_bytes, raw, raw_bytes);
}

/* Whether to use AVX2. plain: use it nowhere, which tests ask for. */
static int with_avx2(int64_t plain)
{
    return !plain && __builtin_cpu_supports("avx2");
}
#else
#define pack_avx2 pack_plain
#define unpack_avx2 unpack_plain
static int with_avx2(int64_t plain)
{
    (void)plain;
    return 0;
}
#endif

static int lengths_are_valid(const char *name, int64_t one, int64_t other)
{
    if (one >= 0 && other >= 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: a length is negative", name);
    return 0;
}

static PyObject *pack12(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[5], size;
    (void)module;
    if (lmcache_integers("pack12", args, nargs, n, 5) < 0 || !lengths_are_valid("pack12", n[1], n[3]))
        return NULL;
    const uint8_t *raw = (const uint8_t *)(intptr_t)n[0];
    uint8_t *stream = (uint8_t *)(intptr_t)n[2];
    Py_BEGIN_ALLOW_THREADS
    size = with_avx2(n[4]) ? pack_avx2(raw, n[1], stream, n[3]) : pack_plain(raw, n[1], stream, n[3]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(size);
}

static PyObject *unpack12(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[6];
    int done;
    (void)module;
    if (lmcache_integers("unpack12", args, nargs, n, 6) < 0 || !lengths_are_valid("unpack12", n[1], n[3]))
        return NULL;
    if (n[0] == n[2] && n[4] == 0) {
        PyErr_SetString(PyExc_ValueError, "unpack12: a stream that begins where raw does needs scratch");
        return NULL;
    }
    const uint8_t *stream = (const uint8_t *)(intptr_t)n[0];
    uint8_t *raw = (uint8_t *)(intptr_t)n[2], *scratch = (uint8_t *)(intptr_t)n[4];
    Py_BEGIN_ALLOW_THREADS
    done = with_avx2(n[5]) ? unpack_avx2(stream, n[1], raw, n[3], scratch) : unpack_plain(stream, n[1], raw, n[3], scratch);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(done);
}

PyMethodDef lmcache_pack12_methods[] = {
    {"pack12", (PyCFunction)(void (*)(void))pack12, METH_FASTCALL,
     "pack12(raw, raw_bytes, stream, room, plain) -> int\n\n"
     "Pack bfloat16 values, without the GIL. raw, stream: addresses; the caller keeps the memory alive. Return the bytes of the\n"
     "stream, or 0 if room may not suffice; at most room bytes are written. plain: 1 for the code without AVX2."},
    {"unpack12", (PyCFunction)(void (*)(void))unpack12, METH_FASTCALL,
     "unpack12(stream, stream_bytes, raw, raw_bytes, scratch, plain) -> bool\n\n"
     "Unpack a stream of pack12, without the GIL. Return whether it is one of raw_bytes bytes; if not, nothing is written to raw.\n"
     "scratch: the address of stream_bytes of memory, used if the stream begins where raw does. It may not overlap otherwise."},
    {NULL, NULL, 0, NULL},
};
