/* XXH3 with 128 bits, no seed and the default secret, for inputs longer than 240 bytes.
 *
 * Source: the algorithm's specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md); tests hold it equal to the `xxhash`
 * library. The input comes in whole blocks of 1 KiB, and an end of at least 64 bytes: nothing has to be kept in between.
 *
 * Why this and not the upstream header (xxhash.h 0.8.4, BSD-2, 7,528 lines): upstream chooses its instruction set when it is
 * compiled, and the wheel is compiled for the oldest x86-64. Checksums of 64 KiB to 4 MiB, one core of an AMD EPYC with AVX2,
 * gcc 12 -O3, best of 41 in turns, in GB/s:
 *
 *                            64 KiB   256 KiB   1 MiB   4 MiB
 *     this file                48        49       48      46
 *     upstream, as a wheel     23        23       23      22
 *     upstream, -mavx2         48        48       47      47
 *     `xxhash` from PyPI       44        46       46      43     (from Python, with upstream's dispatcher)
 *
 * Upstream's own choice at run time is one more C file, which no package offers for a build: the PyPI wheel has no header, and
 * libxxhash-dev is not on every machine that builds, so there would be two paths. AArch64 gets plain C here, and NEON upstream;
 * that difference has not been measured.
 */
#ifndef LMCACHE_XXH3_H
#define LMCACHE_XXH3_H

#include <stdint.h>
#include <string.h>

enum { LANES = 8, STRIPE_BYTES = 64, BLOCK_STRIPES = 16, XXH3_BLOCK = BLOCK_STRIPES * STRIPE_BYTES, SECRET_BYTES = 192 };

static const uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
static const uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9,
                      P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5;

static const uint8_t xxh3_secret[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

typedef uint64_t Lanes[LANES];

static inline uint64_t read_64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value); /* little-endian, like every target of the native module */
    return value;
}

static void xxh3_begin(Lanes acc)
{
    const Lanes first = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    memcpy(acc, first, sizeof first);
}

/* Accumulates `count` stripes, each with the secret 8 bytes further on. */
static inline void stripes_plain(uint64_t *acc, const uint8_t *in, const uint8_t *keys, int64_t count)
{
    for (int64_t stripe = 0; stripe < count; stripe++, in += STRIPE_BYTES, keys += 8)
        for (int i = 0; i < LANES; i++) {
            uint64_t value = read_64(in + 8 * i), key = value ^ read_64(keys + 8 * i);
            acc[i ^ 1] += value;
            acc[i] += (key & 0xffffffff) * (key >> 32);
        }
}

static inline void scramble_plain(uint64_t *acc)
{
    for (int i = 0; i < LANES; i++)
        acc[i] = (acc[i] ^ acc[i] >> 47 ^ read_64(xxh3_secret + SECRET_BYTES - STRIPE_BYTES + 8 * i)) * P32_1;
}

static void blocks_plain(uint64_t *acc, const uint8_t *in, int64_t blocks)
{
    for (; blocks > 0; blocks--, in += XXH3_BLOCK) {
        stripes_plain(acc, in, xxh3_secret, BLOCK_STRIPES);
        scramble_plain(acc);
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static void blocks_avx2(uint64_t *acc, const uint8_t *in, int64_t blocks)
{
    __m256i sums[2] = {_mm256_loadu_si256((__m256i *)acc), _mm256_loadu_si256((__m256i *)acc + 1)};
    const __m256i prime = _mm256_set1_epi64x((long long)P32_1);
    for (; blocks > 0; blocks--) {
        for (int stripe = 0; stripe < BLOCK_STRIPES; stripe++, in += STRIPE_BYTES) {
            _mm_prefetch((const char *)in + 512, _MM_HINT_T0);
            for (int i = 0; i < 2; i++) {
                __m256i value = _mm256_loadu_si256((const __m256i *)in + i);
                __m256i key = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)(xxh3_secret + 8 * stripe) + i));
                __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
                sums[i] = _mm256_add_epi64(sums[i], _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4e)));
            }
        }
        for (int i = 0; i < 2; i++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(xxh3_secret + SECRET_BYTES - STRIPE_BYTES) + i);
            key = _mm256_xor_si256(_mm256_xor_si256(sums[i], _mm256_srli_epi64(sums[i], 47)), key);
            __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(key, 32), prime), 32);
            sums[i] = _mm256_add_epi64(_mm256_mul_epu32(key, prime), high);
        }
    }
    _mm256_storeu_si256((__m256i *)acc, sums[0]);
    _mm256_storeu_si256((__m256i *)acc + 1, sums[1]);
}
#endif

/* Accumulates complete blocks. More of the input must follow. */
static void xxh3_blocks(uint64_t *acc, const uint8_t *in, int64_t blocks)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        blocks_avx2(acc, in, blocks);
        return;
    }
#endif
    blocks_plain(acc, in, blocks);
}

static uint64_t folded_product(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merged(const uint64_t *acc, const uint8_t *keys, uint64_t sum)
{
    for (int i = 0; i < LANES; i += 2)
        sum += folded_product(acc[i] ^ read_64(keys + 8 * i), acc[i + 1] ^ read_64(keys + 8 * i + 8));
    sum = (sum ^ sum >> 37) * 0x165667919E3779F9;
    return sum ^ sum >> 32;
}

/* Accumulates the rest of the input, at least 64 bytes of `length` in all, and writes the digest, big-endian as the library. */
static void xxh3_end(uint64_t *acc, const uint8_t *in, int64_t bytes, uint64_t length, uint8_t digest[16])
{
    int64_t blocks = (bytes - 1) / XXH3_BLOCK, stripes = (bytes - 1) % XXH3_BLOCK / STRIPE_BYTES;
    xxh3_blocks(acc, in, blocks);
    stripes_plain(acc, in + blocks * XXH3_BLOCK, xxh3_secret, stripes);
    stripes_plain(acc, in + bytes - STRIPE_BYTES, xxh3_secret + SECRET_BYTES - STRIPE_BYTES - 7, 1);
    uint64_t halves[2] = {
        merged(acc, xxh3_secret + SECRET_BYTES - STRIPE_BYTES - 11, ~(length * P64_2)),
        merged(acc, xxh3_secret + 11, length * P64_1),
    };
    for (int i = 0; i < 16; i++)
        digest[i] = (uint8_t)(halves[i / 8] >> (56 - 8 * (i % 8)));
}

#endif
