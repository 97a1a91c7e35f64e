/* The codec `int8` (docs/codecs.md): values of a head of a token in 8 bits each, with one scale. It loses precision. A tier's
 * payloads are streams of it; extents of rounded KV have its rows (copy.c), and rows of 4 bits (`k8v4`).
 *
 * A row is `row` values: one head of one token. The stream has for each row its scale (float32) and its codes (int8), then a
 * trailer: `row` (uint32), and the kind of the values (uint32). A value is code * scale, where the scale is the row's largest
 * magnitude / 127. Rows without a magnitude of 2**-100 become zeros. A payload with an infinity, a NaN or the largest float32 is
 * not encoded: code * scale of the last one would be an infinity.
 *
 * All arithmetic is IEEE's, without contraction to fused multiply-add, so every machine decodes the same bits. The loops are plain
 * C; compilers vectorize them, and x86-64 has a second copy for AVX2, chosen at run time.
 */
#include "native.h"

#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#define INLINED static inline __attribute__((always_inline))

enum { BFLOAT16, FLOAT16, FLOAT32, KINDS };
enum { LEAST_ROW = 8, MOST_ROW = 4096, SCALE_BYTES = 4, TRAILER_BYTES = 8 };

#define INFINITE 0x7f800000u
#define TOO_LARGE 0x7f7fffffu            /* the largest float32 */
#define LEAST_BITS ((127u - 100u) << 23) /* 2**-100 */
#define ROUNDER 12582912.0f              /* 1.5 * 2**23: adding it rounds to an integer, which is then in the lowest bits */

/* Values of a payload, which may lie anywhere. */
typedef uint16_t __attribute__((aligned(1), may_alias)) Half;
typedef uint32_t __attribute__((aligned(1), may_alias)) Word;

INLINED uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINED float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINED int item_bytes(int kind)
{
    return kind == FLOAT32 ? 4 : 2;
}

/* One of two numbers, without a branch: compilers do not vectorize one that has arithmetic of floats in it. */
INLINED uint32_t either(int first, uint32_t one, uint32_t other)
{
    uint32_t mask = 0u - (uint32_t)first;
    return (one & mask) | (other & ~mask);
}

INLINED uint32_t widened(const uint8_t *raw, int64_t i, int kind)
{
    if (kind == FLOAT32)
        return ((const Word *)(const void *)raw)[i];
    uint32_t half = ((const Half *)(const void *)raw)[i];
    if (kind == BFLOAT16)
        return half << 16;
    uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    return sign | either(magnitude >= 0x7c00, INFINITE, either(magnitude < 0x400, subnormal, normal));
}

/* The value of a kind that is nearest to a finite one, of two equally near ones the even one. */
INLINED void narrow(float value, uint8_t *raw, int64_t i, int kind)
{
    uint32_t bits = bits_of(value);
    if (kind == FLOAT32) {
        ((Word *)(void *)raw)[i] = bits;
        return;
    }
    if (kind == BFLOAT16) {
        ((Half *)(void *)raw)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        return;
    }
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    ((Half *)(void *)raw)[i] = (uint16_t)(sign | either(magnitude < (113u << 23), subnormal, normal));
}

/* Writes the scale of `count` values: their largest magnitude / levels. Sets the factor of their codes. Returns 0 if they have an
 * infinity, a NaN or the largest float32. */
INLINED int write_scale(const uint8_t *restrict raw, int64_t first, int64_t count, int kind, float levels,
                        uint8_t *restrict to, float *factor)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = widened(raw, first + i, kind) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= TOO_LARGE)
        return 0;
    int zeros = largest < LEAST_BITS;
    float scale = zeros ? 0.0f : float_of(largest) / levels;
    *factor = zeros ? 0.0f : levels / float_of(largest);
    memcpy(to, &scale, SCALE_BYTES);
    return 1;
}

/* Rounds a row to its scale and codes. Returns 0 as `write_scale` does. */
INLINED int round_row(const uint8_t *restrict raw, int64_t row, int kind, uint8_t *restrict to)
{
    float factor;
    if (!write_scale(raw, 0, row, kind, 127.0f, to, &factor))
        return 0;
    to += SCALE_BYTES;
    for (int64_t i = 0; i < row; i++) {
        float scaled = float_of(widened(raw, i, kind)) * factor;
        to[i] = (uint8_t)bits_of(scaled + ROUNDER);
    }
    return 1;
}

INLINED void restore_row(const uint8_t *restrict from, int64_t row, int kind, uint8_t *restrict raw)
{
    float scale;
    memcpy(&scale, from, SCALE_BYTES);
    const int8_t *codes = (const int8_t *)from + SCALE_BYTES;
    for (int64_t i = 0; i < row; i++)
        narrow((float)codes[i] * scale, raw, i, kind);
}

/* Rows of 4 bits: for each group of 32 values a scale, which is the group's largest magnitude / 7, and 16 bytes. Byte i has the code
 * of value i in its lower half and that of value i + 16 in its upper one. */
enum { GROUP = 32, GROUP_BYTES = SCALE_BYTES + GROUP / 2 };

INLINED int round_group(const uint8_t *restrict raw, int64_t first, int kind, uint8_t *restrict to)
{
    float factor;
    if (!write_scale(raw, first, GROUP, kind, 7.0f, to, &factor))
        return 0;
    to += SCALE_BYTES;
    for (int64_t i = 0; i < GROUP / 2; i++) {
        uint32_t low = bits_of(float_of(widened(raw, first + i, kind)) * factor + ROUNDER);
        uint32_t high = bits_of(float_of(widened(raw, first + i + GROUP / 2, kind)) * factor + ROUNDER);
        to[i] = (uint8_t)((low & 15) | high << 4);
    }
    return 1;
}

INLINED void restore_group(const uint8_t *restrict from, int64_t first, int kind, uint8_t *restrict raw)
{
    float scale;
    memcpy(&scale, from, SCALE_BYTES);
    from += SCALE_BYTES;
    for (int64_t i = 0; i < GROUP / 2; i++) {
        narrow((float)(((from[i] & 15) ^ 8) - 8) * scale, raw, first + i, kind);
        narrow((float)(((from[i] >> 4) ^ 8) - 8) * scale, raw, first + i + GROUP / 2, kind);
    }
}

/* Rows of one form, which are `step` bytes apart where they are values. `lmcache_round_rows` and `lmcache_restore_rows`. */
INLINED int round_rows(int form, int kind, const uint8_t *raw, int64_t step, int64_t rows, int64_t row, uint8_t *to)
{
    int fine = 1;
    for (; rows > 0; rows--, raw += step) {
        if (form == FORM_INT8) {
            fine &= round_row(raw, row, kind, to);
            to += SCALE_BYTES + row;
        } else {
            for (int64_t first = 0; first < row; first += GROUP, to += GROUP_BYTES)
                fine &= round_group(raw, first, kind, to);
        }
    }
    return fine;
}

INLINED void restore_rows(int form, int kind, const uint8_t *from, int64_t rows, int64_t row, uint8_t *raw, int64_t step)
{
    for (; rows > 0; rows--, raw += step) {
        if (form == FORM_INT8) {
            restore_row(from, row, kind, raw);
            from += SCALE_BYTES + row;
        } else {
            for (int64_t first = 0; first < row; first += GROUP, from += GROUP_BYTES)
                restore_group(from, first, kind, raw);
        }
    }
}

/* One copy of the loops for each form and kind. */
INLINED int round_any(int form, int kind, const uint8_t *raw, int64_t step, int64_t rows, int64_t row, uint8_t *to)
{
#define CASE(FORM, KIND)              \
    if (form == FORM && kind == KIND) \
        return round_rows(FORM, KIND, raw, step, rows, row, to);
    CASE(FORM_INT8, BFLOAT16)
    CASE(FORM_INT8, FLOAT16)
    CASE(FORM_INT8, FLOAT32)
    CASE(FORM_INT4, BFLOAT16)
    CASE(FORM_INT4, FLOAT16)
    CASE(FORM_INT4, FLOAT32)
#undef CASE
    return 0;
}

INLINED void restore_any(int form, int kind, const uint8_t *from, int64_t rows, int64_t row, uint8_t *raw, int64_t step)
{
#define CASE(FORM, KIND)              \
    if (form == FORM && kind == KIND) \
        restore_rows(FORM, KIND, from, rows, row, raw, step);
    CASE(FORM_INT8, BFLOAT16)
    CASE(FORM_INT8, FLOAT16)
    CASE(FORM_INT8, FLOAT32)
    CASE(FORM_INT4, BFLOAT16)
    CASE(FORM_INT4, FLOAT16)
    CASE(FORM_INT4, FLOAT32)
#undef CASE
}

/* Returns the bytes of the stream, or 0 if the payload cannot be encoded, or not to at most `room` bytes. */
INLINED int64_t encode(const uint8_t *raw, int64_t raw_bytes, int64_t row, int kind, uint8_t *stream, int64_t room)
{
    int64_t row_bytes = row * item_bytes(kind), rows = raw_bytes / row_bytes;
    int64_t size = rows * (SCALE_BYTES + row) + TRAILER_BYTES;
    if (raw_bytes % row_bytes || size > room)
        return 0;
    for (int64_t i = 0; i < rows; i++)
        if (!round_row(raw + i * row_bytes, row, kind, stream + i * (SCALE_BYTES + row)))
            return 0;
    const uint32_t trailer[2] = {(uint32_t)row, (uint32_t)kind};
    memcpy(stream + size - TRAILER_BYTES, trailer, TRAILER_BYTES);
    return size;
}

/* From the last row on, so that the stream may lie at the beginning of `raw`: a row is larger than what it was, so only its own
 * codes may be overwritten, and these are copied before. */
INLINED void decode(const uint8_t *stream, int64_t rows, int64_t row, int kind, uint8_t *raw)
{
    uint8_t own[SCALE_BYTES + MOST_ROW];
    for (int64_t i = rows - 1; i >= 0; i--) {
        memcpy(own, stream + i * (SCALE_BYTES + row), (size_t)(SCALE_BYTES + row));
        restore_row(own, row, kind, raw + i * row * item_bytes(kind));
    }
}

/* One copy of the loops for each kind. */
INLINED int64_t encode_kind(const uint8_t *raw, int64_t raw_bytes, int64_t row, int kind, uint8_t *stream, int64_t room)
{
    if (kind == BFLOAT16)
        return encode(raw, raw_bytes, row, BFLOAT16, stream, room);
    if (kind == FLOAT16)
        return encode(raw, raw_bytes, row, FLOAT16, stream, room);
    return encode(raw, raw_bytes, row, FLOAT32, stream, room);
}

INLINED void decode_kind(const uint8_t *stream, int64_t rows, int64_t row, int kind, uint8_t *raw)
{
    if (kind == BFLOAT16)
        decode(stream, rows, row, BFLOAT16, raw);
    else if (kind == FLOAT16)
        decode(stream, rows, row, FLOAT16, raw);
    else
        decode(stream, rows, row, FLOAT32, raw);
}

static int64_t encode_plain(const uint8_t *raw, int64_t raw_bytes, int64_t row, int kind, uint8_t *stream, int64_t room)
{
    return encode_kind(raw, raw_bytes, row, kind, stream, room);
}

static void decode_plain(const uint8_t *stream, int64_t rows, int64_t row, int kind, uint8_t *raw)
{
    decode_kind(stream, rows, row, kind, raw);
}

static int round_plain(int form, int kind, const uint8_t *raw, int64_t step, int64_t rows, int64_t row, uint8_t *to)
{
    return round_any(form, kind, raw, step, rows, row, to);
}

static void restore_plain(int form, int kind, const uint8_t *from, int64_t rows, int64_t row, uint8_t *raw, int64_t step)
{
    restore_any(form, kind, from, rows, row, raw, step);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static int round_avx2(int form, int kind, const uint8_t *raw, int64_t step, int64_t rows,
                                                      int64_t row, uint8_t *to)
{
    return round_any(form, kind, raw, step, rows, row, to);
}

__attribute__((target("avx2"))) static void restore_avx2(int form, int kind, const uint8_t *from, int64_t rows, int64_t row,
                                                         uint8_t *raw, int64_t step)
{
    restore_any(form, kind, from, rows, row, raw, step);
}

__attribute__((target("avx2"))) static int64_t encode_avx2(const uint8_t *raw, int64_t raw_bytes, int64_t row, int kind,
                                                           uint8_t *stream, int64_t room)
{
    return encode_kind(raw, raw_bytes, row, kind, stream, room);
}

__attribute__((target("avx2"))) static void decode_avx2(const uint8_t *stream, int64_t rows, int64_t row, int kind, uint8_t *raw)
{
    decode_kind(stream, rows, row, kind, raw);
}

/* Whether to use AVX2. plain: use it nowhere, which tests ask for. */
static int with_avx2(int64_t plain)
{
    return !plain && __builtin_cpu_supports("avx2");
}
#else
#define encode_avx2 encode_plain
#define decode_avx2 decode_plain
#define round_avx2 round_plain
#define restore_avx2 restore_plain
static int with_avx2(int64_t plain)
{
    (void)plain;
    return 0;
}
#endif

int lmcache_round_rows(int plain, int form, int kind, const uint8_t *raw, int64_t step, int64_t rows, int64_t row, uint8_t *to)
{
    return with_avx2(plain) ? round_avx2(form, kind, raw, step, rows, row, to)
                            : round_plain(form, kind, raw, step, rows, row, to);
}

void lmcache_restore_rows(int plain, int form, int kind, const uint8_t *from, int64_t rows, int64_t row, uint8_t *raw, int64_t step)
{
    if (with_avx2(plain))
        restore_avx2(form, kind, from, rows, row, raw, step);
    else
        restore_plain(form, kind, from, rows, row, raw, step);
}

static int is_kind(int64_t row, int64_t kind)
{
    return row >= LEAST_ROW && row <= MOST_ROW && kind >= 0 && kind < KINDS;
}

static PyObject *to_int8(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[7], size;
    (void)module;
    if (lmcache_integers("to_int8", args, nargs, n, 7) < 0)
        return NULL;
    if (n[1] < 0 || n[5] < 0 || !is_kind(n[2], n[3])) {
        PyErr_SetString(PyExc_ValueError, "to_int8: a length is negative, or the row or the kind is out of range");
        return NULL;
    }
    const uint8_t *raw = (const uint8_t *)(intptr_t)n[0];
    uint8_t *stream = (uint8_t *)(intptr_t)n[4];
    Py_BEGIN_ALLOW_THREADS
    size = with_avx2(n[6]) ? encode_avx2(raw, n[1], n[2], (int)n[3], stream, n[5])
                           : encode_plain(raw, n[1], n[2], (int)n[3], stream, n[5]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(size);
}

static PyObject *from_int8(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[5];
    (void)module;
    if (lmcache_integers("from_int8", args, nargs, n, 5) < 0)
        return NULL;
    if (n[1] < 0 || n[3] < 0) {
        PyErr_SetString(PyExc_ValueError, "from_int8: a length is negative");
        return NULL;
    }
    const uint8_t *stream = (const uint8_t *)(intptr_t)n[0];
    uint8_t *raw = (uint8_t *)(intptr_t)n[2];
    uint32_t trailer[2] = {0, KINDS};
    if (n[1] >= TRAILER_BYTES)
        memcpy(trailer, stream + n[1] - TRAILER_BYTES, TRAILER_BYTES);
    int64_t row = trailer[0], kind = trailer[1];
    if (!is_kind(row, kind))
        Py_RETURN_FALSE;
    int64_t row_bytes = row * item_bytes((int)kind), rows = n[3] / row_bytes;
    if (n[3] % row_bytes || rows * (SCALE_BYTES + row) != n[1] - TRAILER_BYTES)
        Py_RETURN_FALSE;
    Py_BEGIN_ALLOW_THREADS
    if (with_avx2(n[4]))
        decode_avx2(stream, rows, row, (int)kind, raw);
    else
        decode_plain(stream, rows, row, (int)kind, raw);
    Py_END_ALLOW_THREADS
    Py_RETURN_TRUE;
}

PyMethodDef lmcache_int8_methods[] = {
    {"to_int8", (PyCFunction)(void (*)(void))to_int8, METH_FASTCALL,
     "to_int8(raw, raw_bytes, row, kind, stream, room, plain) -> int\n\n"
     "Round rows of `row` values to 8 bits each, without the GIL. raw, stream: addresses; the caller keeps the memory alive.\n"
     "kind: of the values, 0 bfloat16, 1 float16, 2 float32. Return the bytes of the stream; 0 if room does not suffice, there is\n"
     "no whole number of rows, or a value is not finite or the largest float32. At most room bytes are written. plain: 1 for the\n"
     "code without AVX2."},
    {"from_int8", (PyCFunction)(void (*)(void))from_int8, METH_FASTCALL,
     "from_int8(stream, stream_bytes, raw, raw_bytes, plain) -> bool\n\n"
     "Restore the values of a stream of to_int8, without the GIL. Return whether it is one of raw_bytes bytes; if not, nothing is\n"
     "written. The stream may begin where raw does. It may not overlap otherwise."},
    {NULL, NULL, 0, NULL},
};
