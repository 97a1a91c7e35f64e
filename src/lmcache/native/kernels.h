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

#define PLAIN_TRANSPOSE(ITEM)                                                                                             \
    static void transpose_##ITEM##_plain(char *to, int64_t to_stride, const char *from, int64_t from_stride,              \
                                         int64_t rows, int64_t columns)                                                   \
    {                                                                                                                     \
        for (int64_t c = 0; c < columns; c++)                                                                             \
            for (int64_t r = 0; r < rows; r++)                                                                            \
                memcpy(to + c * to_stride + r * ITEM, from + r * from_stride + c * ITEM, ITEM);                           \
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

/* Every address that `stride` steps from `p` reach starts a line. */
static inline int starts_lines(const char *p, int64_t stride)
{
    return (((uintptr_t)p | (uintptr_t)stride) & (LINE - 1)) == 0;
}

#endif
