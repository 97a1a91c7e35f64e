/* The inner loops of copy.c: what a kernel is, the ones in plain C, and the choice among all that the CPU can run. */
#ifndef LMCACHE_KERNELS_H
#define LMCACHE_KERNELS_H

#include <stdint.h>
#include <string.h>

/* Rows of at least this many bytes are written past the caches; shorter ones would leave half-written lines behind. */
enum { LINE = 64, STREAM_BYTES = 128, PREFETCH_BYTES = 1024 };

/* `count` rows of `bytes` bytes. `next` is what will be read after them: its first lines are fetched ahead. */
typedef void (*RowsKernel)(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t bytes,
                           int64_t count, const char *next);

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

static void rows_plain(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t bytes, int64_t count,
                       const char *next)
{
    (void)next;
    for (int64_t i = 0; i < count; i++)
        memcpy(to + i * to_stride, from + i * from_stride, (size_t)bytes);
}

/* Two rows of 2-byte items against one of pairs, as kernels for matrix units keep them. Inlined into functions for
 * newer instruction sets, where the compiler turns the loops into vectors. */
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

/* The transposes of 2-byte items that are no more than that; 0 for all others. */
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

/* Every address that `stride` steps from `p` reach starts a line. */
static inline int starts_lines(const char *p, int64_t stride)
{
    return (((uintptr_t)p | (uintptr_t)stride) & (LINE - 1)) == 0;
}

#endif
