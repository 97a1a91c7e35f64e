/* Kernels for x86-64: AVX2 and AVX-512, compiled for any x86-64 and chosen at run time. AVX-512 has transposes only: rows are
 * no faster with it.
 *
 * Transposes work on squares of 4-byte items in registers. Items of 2 bytes become 4-byte ones first: two rows are
 * interleaved into pairs, which is one of the steps of the transpose.
 */
#ifndef LMCACHE_KERNELS_X86_H
#define LMCACHE_KERNELS_X86_H

#include "kernels.h"

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define INLINE static inline __attribute__((always_inline))

/* ---- AVX2 ------------------------------------------------------------ */

AVX2 INLINE void line_avx2(char *to, const char *from)
{
    __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
    _mm256_stream_si256((__m256i *)to, a);
    _mm256_stream_si256((__m256i *)(to + 32), b);
}

/* Copies one long row. Prefetching runs PREFETCH_BYTES ahead and continues at `next` where the row ends. */
AVX2 static void row_avx2(char *to, const char *from, int64_t bytes, const char *next)
{
    int64_t edge = -(int64_t)(uintptr_t)to & (LINE - 1);
    if (edge > 0) {
        memcpy(to, from, (size_t)edge);
        to += edge, from += edge, bytes -= edge;
    }
    int64_t lines = bytes / LINE, within = lines - PREFETCH_BYTES / LINE, i = 0;
    for (; i < within; i++) {
        _mm_prefetch(from + i * LINE + PREFETCH_BYTES, _MM_HINT_NTA);
        line_avx2(to + i * LINE, from + i * LINE);
    }
    for (const char *soon = next; i < lines; i++, soon += LINE) {
        _mm_prefetch(soon, _MM_HINT_NTA);
        line_avx2(to + i * LINE, from + i * LINE);
    }
    if (bytes % LINE)
        memcpy(to + lines * LINE, from + lines * LINE, (size_t)(bytes % LINE));
}

/* The row that is prefetched: `first` is the first one of its outer step. The counts are of what is left. */
typedef struct {
    const char *row, *first;
    int64_t outer, inner;
} Soon;

/* Moves to the following row, and from the last one to `next`. */
INLINE void advance(Soon *soon, Steps outer, Steps inner, const char *next)
{
    soon->row += inner.from;
    if (--soon->inner > 0)
        return;
    soon->inner = inner.count;
    soon->first += outer.from;
    if (--soon->outer == 0) {
        soon->outer = outer.count;
        soon->first = next;
    }
    soon->row = soon->first;
}

/* Copies short rows of complete lines. What lies between the rows is not prefetched. */
AVX2 INLINE void short_rows_avx2(char *to, const char *from, int64_t bytes, Steps outer, Steps inner, const char *next)
{
    Soon soon = {from, from, outer.count, inner.count};
    for (int64_t ahead = PREFETCH_BYTES / bytes; ahead > 0; ahead--)
        advance(&soon, outer, inner, next);
    for (int64_t o = 0; o < outer.count; o++) {
        for (int64_t i = 0; i < inner.count; i++) {
            for (int64_t at = 0; at < bytes; at += LINE) {
                _mm_prefetch(soon.row + at, _MM_HINT_NTA);
                line_avx2(to + i * inner.to + at, from + i * inner.from + at);
            }
            advance(&soon, outer, inner, next);
        }
        to += outer.to, from += outer.from;
    }
}

AVX2 INLINE void long_rows_avx2(char *to, const char *from, int64_t bytes, Steps outer, Steps inner, const char *next)
{
    Soon soon = {from, from, outer.count, inner.count};
    for (int64_t o = 0; o < outer.count; o++) {
        for (int64_t i = 0; i < inner.count; i++) {
            advance(&soon, outer, inner, next);
            row_avx2(to + i * inner.to, from + i * inner.from, bytes, soon.row);
        }
        to += outer.to, from += outer.from;
    }
}

AVX2 static void rows_avx2(char *to, const char *from, int64_t bytes, Steps outer, Steps inner, const char *next)
{
    if (bytes >= 4 * STREAM_BYTES) {
        long_rows_avx2(to, from, bytes, outer, inner, next);
    } else if (bytes % LINE == 0 && starts_lines(to, inner.to | outer.to)) {
        short_rows_avx2(to, from, bytes, outer, inner, next);
    } else if (bytes % 32 == 0) {
        for (int64_t o = 0; o < outer.count; o++, to += outer.to, from += outer.from)
            for (int64_t i = 0; i < inner.count; i++)
                for (int64_t at = 0; at < bytes; at += 32)
                    _mm256_storeu_si256((__m256i *)(to + i * inner.to + at),
                                        _mm256_loadu_si256((const __m256i *)(from + i * inner.from + at)));
    } else {
        rows_plain(to, from, bytes, outer, inner, next);
    }
}

/* Transposes eight registers of eight 4-byte items. */
AVX2 INLINE void square_avx2(__m256i v[8])
{
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            u[i + 2 * k] = _mm256_unpacklo_epi64(t[i + k], t[i + k + 2]);
            u[i + 2 * k + 1] = _mm256_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

/* Prefetches what the next columns read: the same rows, a line or two further on, which no hardware prefetcher predicts. */
INLINE const char *ahead(const char *row)
{
    _mm_prefetch(row + 2 * LINE, _MM_HINT_T0);
    return row;
}

/* Loads eight rows of eight 4-byte items. */
AVX2 INLINE void load_4_avx2(__m256i v[8], const char *from, int64_t stride)
{
    for (int i = 0; i < 8; i++)
        v[i] = _mm256_loadu_si256((const __m256i *)ahead(from + i * stride));
}

/* Loads sixteen rows of eight 2-byte items, two rows to a register as pairs. */
AVX2 INLINE void load_2_avx2(__m256i v[8], const char *from, int64_t stride)
{
    for (int i = 0; i < 8; i++) {
        __m128i a = _mm_loadu_si128((const __m128i *)ahead(from + 2 * i * stride));
        __m128i b = _mm_loadu_si128((const __m128i *)ahead(from + (2 * i + 1) * stride));
        v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(a, b)), _mm_unpackhi_epi16(a, b), 1);
    }
}

/* Two adjacent squares fill complete lines of the target: 64 / item rows of the source, 8 columns. */
#define TRANSPOSE_AVX2(ITEM)                                                                                           \
    AVX2 static void transpose_##ITEM##_avx2(char *to, int64_t to_stride, const char *from, int64_t from_stride,       \
                                             int64_t rows, int64_t columns)                                            \
    {                                                                                                                  \
        if (ITEM == 2 && transpose_pairs(to, to_stride, from, from_stride, rows, columns))                             \
            return;                                                                                                    \
        enum { HIGH = LINE / ITEM, WIDE = 8 };                                                                         \
        int64_t whole_rows = rows / HIGH * HIGH, whole_columns = columns / WIDE * WIDE;                                \
        int stream = starts_lines(to, to_stride);                                                                      \
        for (int64_t c = 0; c < whole_columns; c += WIDE)                                                              \
            for (int64_t r = 0; r < whole_rows; r += HIGH) {                                                           \
                __m256i a[8], b[8];                                                                                    \
                const char *source = from + r * from_stride + c * ITEM;                                                \
                char *target = to + c * to_stride + r * ITEM;                                                          \
                load_##ITEM##_avx2(a, source, from_stride);                                                            \
                square_avx2(a);                                                                                        \
                load_##ITEM##_avx2(b, source + HIGH / 2 * from_stride, from_stride);                                   \
                square_avx2(b);                                                                                        \
                for (int i = 0; i < 8; i++, target += to_stride) {                                                     \
                    if (stream) {                                                                                      \
                        _mm256_stream_si256((__m256i *)target, a[i]);                                                  \
                        _mm256_stream_si256((__m256i *)(target + 32), b[i]);                                           \
                    } else {                                                                                           \
                        _mm256_storeu_si256((__m256i *)target, a[i]);                                                  \
                        _mm256_storeu_si256((__m256i *)(target + 32), b[i]);                                           \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        transpose_##ITEM##_plain(to + whole_rows * ITEM, to_stride, from + whole_rows * from_stride, from_stride,      \
                                 rows - whole_rows, columns);                                                          \
        transpose_##ITEM##_plain(to + whole_columns * to_stride, to_stride, from + whole_columns * ITEM, from_stride,  \
                                 whole_rows, columns - whole_columns);                                                 \
    }
TRANSPOSE_AVX2(4)
TRANSPOSE_AVX2(2)

/* ---- AVX-512 ------------------------------------------------------------ */

/* Transposes sixteen registers of sixteen 4-byte items. */
AVX512 INLINE void square_avx512(__m512i v[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            v[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            v[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    /* Now v[4q + k] holds, in its lane l, column 4l + k of rows 4q .. 4q + 3: transpose the 4 x 4 lanes. */
    for (int k = 0; k < 4; k++) {
        t[k] = _mm512_shuffle_i32x4(v[k], v[k + 4], 0x88);
        t[k + 4] = _mm512_shuffle_i32x4(v[k], v[k + 4], 0xdd);
        t[k + 8] = _mm512_shuffle_i32x4(v[k + 8], v[k + 12], 0x88);
        t[k + 12] = _mm512_shuffle_i32x4(v[k + 8], v[k + 12], 0xdd);
    }
    for (int k = 0; k < 4; k++) {
        v[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        v[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
        v[k + 4] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88);
        v[k + 12] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd);
    }
}

AVX512 INLINE void load_4_avx512(__m512i v[16], const char *from, int64_t stride)
{
    for (int i = 0; i < 16; i++)
        v[i] = _mm512_loadu_si512(ahead(from + i * stride));
}

/* Loads 32 rows of sixteen 2-byte items, two rows to a register as pairs. */
AVX512 INLINE void load_2_avx512(__m512i v[16], const char *from, int64_t stride)
{
    for (int i = 0; i < 16; i++) {
        __m256i a = _mm256_loadu_si256((const __m256i *)ahead(from + 2 * i * stride));
        __m256i b = _mm256_loadu_si256((const __m256i *)ahead(from + (2 * i + 1) * stride));
        __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_cvtepu16_epi32(b);
        v[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
}

#define TRANSPOSE_AVX512(ITEM)                                                                                         \
    AVX512 static void transpose_##ITEM##_avx512(char *to, int64_t to_stride, const char *from, int64_t from_stride,   \
                                                 int64_t rows, int64_t columns)                                        \
    {                                                                                                                  \
        if (ITEM == 2 && transpose_pairs(to, to_stride, from, from_stride, rows, columns))                             \
            return;                                                                                                    \
        enum { HIGH = LINE / ITEM, WIDE = 16 };                                                                        \
        int64_t whole_rows = rows / HIGH * HIGH, whole_columns = columns / WIDE * WIDE;                                \
        int stream = starts_lines(to, to_stride);                                                                      \
        for (int64_t c = 0; c < whole_columns; c += WIDE)                                                              \
            for (int64_t r = 0; r < whole_rows; r += HIGH) {                                                           \
                __m512i v[16];                                                                                         \
                char *target = to + c * to_stride + r * ITEM;                                                          \
                load_##ITEM##_avx512(v, from + r * from_stride + c * ITEM, from_stride);                               \
                square_avx512(v);                                                                                      \
                for (int i = 0; i < 16; i++, target += to_stride) {                                                    \
                    if (stream)                                                                                        \
                        _mm512_stream_si512((__m512i *)target, v[i]);                                                  \
                    else                                                                                               \
                        _mm512_storeu_si512(target, v[i]);                                                             \
                }                                                                                                      \
            }                                                                                                          \
        transpose_##ITEM##_avx2(to + whole_rows * ITEM, to_stride, from + whole_rows * from_stride, from_stride,       \
                                rows - whole_rows, columns);                                                           \
        transpose_##ITEM##_avx2(to + whole_columns * to_stride, to_stride, from + whole_columns * ITEM, from_stride,   \
                                whole_rows, columns - whole_columns);                                                  \
    }
TRANSPOSE_AVX512(4)
TRANSPOSE_AVX512(2)

#endif
