/* The machine's limit: paged KV -> slot and back, one pass with non-temporal stores, nothing checked, nothing general.
 *
 * planes: one address a plane (K or V of one layer), each [block][run_bytes]; a slot is [plane][block of the chunk][run_bytes].
 * Built when the benchmark runs, with -march=native.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

/* Enough to hide the latency of memory at 10 to 20 GB/s a core. */
#define AHEAD_BYTES 4096

static void stream(char *to, const char *from, size_t bytes) {
#if defined(__AVX512F__)
    size_t at = 0;
    for (; at + 256 <= bytes; at += 256) {
        __m512i a = _mm512_loadu_si512(from + at), b = _mm512_loadu_si512(from + at + 64);
        __m512i c = _mm512_loadu_si512(from + at + 128), d = _mm512_loadu_si512(from + at + 192);
        for (int line = 0; line < 256; line += 64)
            _mm_prefetch(from + at + AHEAD_BYTES + line, _MM_HINT_NTA);
        _mm512_stream_si512((void *)(to + at), a);
        _mm512_stream_si512((void *)(to + at + 64), b);
        _mm512_stream_si512((void *)(to + at + 128), c);
        _mm512_stream_si512((void *)(to + at + 192), d);
    }
    memcpy(to + at, from + at, bytes - at);
#elif defined(__AVX2__)
    size_t at = 0;
    for (; at + 128 <= bytes; at += 128) {
        __m256i a = _mm256_loadu_si256((const void *)(from + at)), b = _mm256_loadu_si256((const void *)(from + at + 32));
        __m256i c = _mm256_loadu_si256((const void *)(from + at + 64)), d = _mm256_loadu_si256((const void *)(from + at + 96));
        _mm_prefetch(from + at + AHEAD_BYTES, _MM_HINT_NTA);
        _mm_prefetch(from + at + AHEAD_BYTES + 64, _MM_HINT_NTA);
        _mm256_stream_si256((void *)(to + at), a);
        _mm256_stream_si256((void *)(to + at + 32), b);
        _mm256_stream_si256((void *)(to + at + 64), c);
        _mm256_stream_si256((void *)(to + at + 96), d);
    }
    memcpy(to + at, from + at, bytes - at);
#else
    memcpy(to, from, bytes);
#endif
}

/* Planes [first, end) of one chunk. scatter: 0 paged -> slot, 1 slot -> paged. Addresses are multiples of 64. */
void copy_chunk(int scatter, char *const *planes, int first, int end, size_t run_bytes, const int32_t *blocks, int count, char *slot) {
    for (int plane = first; plane < end; plane++)
        for (int i = 0; i < count; i++) {
            char *paged = planes[plane] + (size_t)blocks[i] * run_bytes;
            char *run = slot + ((size_t)plane * count + i) * run_bytes;
            if (scatter)
                stream(paged, run, run_bytes);
            else
                stream(run, paged, run_bytes);
        }
#if defined(__AVX512F__) || defined(__AVX2__)
    _mm_sfence();
#endif
}
