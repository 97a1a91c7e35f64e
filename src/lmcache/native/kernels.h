/* The inner loops of copy.c: the types of the kernels, and the kernels in plain C. */
#ifndef LMCACHE_KERNELS_H
#define LMCACHE_KERNELS_H

#include <stdint.h>
#include <string.h>

/* Rows of at least this many bytes bypass the caches when written; shorter ones would leave partly written lines behind. */
enum { LINE = 64, STREAM_BYTES = 128, PREFETCH_BYTES = 1024 };

/* An axis of rows: how many there are, and the step from one to the next on both sides. */
typedef struct {
    int64_t count, to, from;
} Steps;

/* Copies rows of `bytes` bytes: those of `inner` at each step of `outer`. Rows in the same order from `next` on will be read
 * after them: the first of these are prefetched. */
typedef void (*RowsKernel)(char *to, const char *from, int64_t bytes, Steps outer, Steps inner, const char *next);

/* to[c * to_stride + r * item] = from[r * from_stride + c * item] for r < rows, c < columns. */
typedef void (*TransposeKernel)(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t rows,
                                int64_t columns);

typedef struct {
    const char *name;
    RowsKernel rows;
    TransposeKernel transpose_2, transpose_4; /* by item bytes */
} Isa;

#define PLAIN_TRANSPOSE(ITEM)                                                                                          \
    static void transpose_##ITEM##_plain(char *to, int64_t to_stride, const char *from, int64_t from_stride,           \
                                         int64_t rows, int64_t columns)                                                \
    {                                                                                                                  \
        for (int64_t c = 0; c < columns; c++)                                                                          \
            for (int64_t r = 0; r < rows; r++)                                                                         \
                memcpy(to + c * to_stride + r * ITEM, from + r * from_stride + c * ITEM, ITEM);                        \
    }
PLAIN_TRANSPOSE(1)
PLAIN_TRANSPOSE(2)
PLAIN_TRANSPOSE(4)
PLAIN_TRANSPOSE(8)

static void rows_plain(char *to, const char *from, int64_t bytes, Steps outer, Steps inner, const char *next)
{
    (void)next;
    for (int64_t o = 0; o < outer.count; o++)
        for (int64_t i = 0; i < inner.count; i++)
            memcpy(to + o * outer.to + i * inner.to, from + o * outer.from + i * inner.from, (size_t)bytes);
}

/* Interleaves two rows of 2-byte items into one row of pairs, the order of kernels for matrix units. It is inlined into functions
 * for newer instruction sets, where the compiler vectorizes the loops. */
static inline __attribute__((always_inline)) void zip_2(char *to, const char *a, const char *b, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint16_t pair[2];
        memcpy(&pair[0], a + 2 * i, 2);
        memcpy(&pair[1], b + 2 * i, 2);
        memcpy(to + 4 * i, pair, 4);
    }
}

static inline __attribute__((always_inline)) void unzip_2(char *a, char *b, const char *from, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint16_t pair[2];
        memcpy(pair, from + 4 * i, 4);
        memcpy(a + 2 * i, &pair[0], 2);
        memcpy(b + 2 * i, &pair[1], 2);
    }
}

/* Does transposes of 2-byte items that only make or split pairs. Returns 0 for all others. */
static inline __attribute__((always_inline)) int transpose_pairs(char *to, int64_t to_stride, const char *from,
                                                                 int64_t from_stride, int64_t rows, int64_t columns)
{
    if (rows == 2 && to_stride == 4)
        zip_2(to, from, from + from_stride, columns);
    else if (columns == 2 && from_stride == 4)
        unzip_2(to, to + to_stride, from, rows);
    else
        return 0;
    return 1;
}

/* Returns whether every address that `stride` steps from `p` reach starts a cache line. */
static inline int starts_lines(const char *p, int64_t stride)
{
    return (((uintptr_t)p | (uintptr_t)stride) & (LINE - 1)) == 0;
}

#endif
