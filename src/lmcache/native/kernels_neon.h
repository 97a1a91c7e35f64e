/* Kernels for aarch64: NEON, which every such CPU has. Long rows use the C library's memcpy, which is tuned for each core.
 *
 * Transposes work as on x86: squares of 4-byte items in registers, items of 2 bytes interleaved into pairs first.
 */
#ifndef LMCACHE_KERNELS_NEON_H
#define LMCACHE_KERNELS_NEON_H

#include "kernels.h"

#include <arm_neon.h>

/* Transposes four registers of four 4-byte items. */
static inline void square_neon(uint32x4_t v[4])
{
    uint32x4x2_t a = vtrnq_u32(v[0], v[1]), b = vtrnq_u32(v[2], v[3]);
    v[0] = vcombine_u32(vget_low_u32(a.val[0]), vget_low_u32(b.val[0]));
    v[1] = vcombine_u32(vget_low_u32(a.val[1]), vget_low_u32(b.val[1]));
    v[2] = vcombine_u32(vget_high_u32(a.val[0]), vget_high_u32(b.val[0]));
    v[3] = vcombine_u32(vget_high_u32(a.val[1]), vget_high_u32(b.val[1]));
}

/* Prefetches what the next columns read: the same rows, a line or two further on. */
static inline const uint8_t *ahead(const char *row)
{
    __builtin_prefetch(row + 2 * LINE);
    return (const uint8_t *)row;
}

/* Loads four rows of four 4-byte items. */
static inline void load_4_neon(uint32x4_t v[4], const char *from, int64_t stride)
{
    for (int i = 0; i < 4; i++)
        v[i] = vreinterpretq_u32_u8(vld1q_u8(ahead(from + i * stride)));
}

/* Loads eight rows of four 2-byte items, two rows to a register as pairs. */
static inline void load_2_neon(uint32x4_t v[4], const char *from, int64_t stride)
{
    for (int i = 0; i < 4; i++) {
        uint16x4_t a = vreinterpret_u16_u8(vld1_u8(ahead(from + 2 * i * stride)));
        uint16x4_t b = vreinterpret_u16_u8(vld1_u8(ahead(from + (2 * i + 1) * stride)));
        uint16x4x2_t pairs = vzip_u16(a, b);
        v[i] = vreinterpretq_u32_u16(vcombine_u16(pairs.val[0], pairs.val[1]));
    }
}

/* Four adjacent squares fill complete lines of the target: 64 / item rows of the source, 4 columns. */
#define TRANSPOSE_NEON(ITEM)                                                                                           \
    static void transpose_##ITEM##_neon(char *to, int64_t to_stride, const char *from, int64_t from_stride,            \
                                        int64_t rows, int64_t columns)                                                 \
    {                                                                                                                  \
        if (ITEM == 2 && transpose_pairs(to, to_stride, from, from_stride, rows, columns))                             \
            return;                                                                                                    \
        enum { HIGH = LINE / ITEM, WIDE = 4 };                                                                         \
        int64_t whole_rows = rows / HIGH * HIGH, whole_columns = columns / WIDE * WIDE;                                \
        for (int64_t c = 0; c < whole_columns; c += WIDE)                                                              \
            for (int64_t r = 0; r < whole_rows; r += HIGH) {                                                           \
                uint32x4_t v[4][4];                                                                                    \
                for (int k = 0; k < 4; k++) {                                                                          \
                    load_##ITEM##_neon(v[k], from + (r + k * HIGH / 4) * from_stride + c * ITEM, from_stride);         \
                    square_neon(v[k]);                                                                                 \
                }                                                                                                      \
                for (int i = 0; i < 4; i++)                                                                            \
                    for (int k = 0; k < 4; k++)                                                                        \
                        vst1q_u8((uint8_t *)to + (c + i) * to_stride + r * ITEM + 16 * k,                              \
                                 vreinterpretq_u8_u32(v[k][i]));                                                       \
            }                                                                                                          \
        transpose_##ITEM##_plain(to + whole_rows * ITEM, to_stride, from + whole_rows * from_stride, from_stride,      \
                                 rows - whole_rows, columns);                                                          \
        transpose_##ITEM##_plain(to + whole_columns * to_stride, to_stride, from + whole_columns * ITEM, from_stride,  \
                                 whole_rows, columns - whole_columns);                                                 \
    }
TRANSPOSE_NEON(4)
TRANSPOSE_NEON(2)

#endif
