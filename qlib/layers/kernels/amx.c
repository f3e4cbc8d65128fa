// Many rows on processors with AMX, whose tile products make eight times as much at once as vectors: int8 x int8, summed
// exactly as in int8.c, and bf16 x int8 and bf16 x int4, whose weights are expanded some at a time.

#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

#if !defined(__AMX_INT8__) || !defined(__AMX_BF16__)

int amx_ready(int threads) { return 0; }
void keep_tiles(void *shape, int threads) {}
void restore_tiles(const void *shape, int threads) {}
void int8_tiles(const int8_t *x, const float *row_scales, const int8_t *w, const bf16 *scales, const bf16 *bias,
                bf16 *out, long rows, long in, long channels, int threads) {}
void int8_wide_tiles(const bf16 *x, const int8_t *w, const bf16 *scales, const float *offsets, const bf16 *bias,
                     bf16 *out, long rows, long in, long channels, int threads) {}
void int4_tiles(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, bf16 *out, long rows, long in,
                long group, long channels, long apart, long bits, int threads) {}

#else

// By hand: gcc 12 does not know that its intrinsics read memory, and leaves out what was written for them.
#define LOAD_APART(tile, at, apart) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"((long)(apart)) : "memory")
#define LOAD(tile, at) LOAD_APART(tile, at, TILE)
#define STORE(tile, at) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(at), "r"((long)TILE) : "memory")
#define LOAD_SUMS(sums) LOAD(0, sums); LOAD(1, (sums) + 256); LOAD(2, (sums) + 512); LOAD(3, (sums) + 768)
#define STORE_SUMS(sums) STORE(0, sums); STORE(1, (sums) + 256); STORE(2, (sums) + 512); STORE(3, (sums) + 768)
#define MULTIPLY_INT8(sum, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)
#define MULTIPLY_BF16(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

// A register holds 16 rows of 64 bytes. Four of them sum up PAIR rows x PAIR channels.
enum { SIDE = 16, TILE = 64, BYTES = SIDE * TILE, PAIR = 2 * SIDE };
// Input channels, rows and channels summed before moving on: what is read again and again stays in the first two caches.
enum { DEPTH = 1024, BLOCK = 512, PANEL = 512 };

// Whether the system lets this process use the tiles: it must be asked once.
int amx_ready(int threads) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

// The shape of this thread's tiles, 64 bytes, all 0 where they have none; and back to it, where it is one.
void keep_tiles(void *shape, int threads) { __asm__ volatile("sttilecfg %0" : "=m"(*(char(*)[64])shape)); }
void restore_tiles(const void *shape, int threads) {
    if (*(const char *)shape) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])shape));
}

INLINE void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    EACH(i, 8) shape.bytes[i] = TILE, shape.rows[i] = SIDE;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}

// Channels that one thread takes at a time, a multiple of `unit`.
static long share(long channels, long unit, int threads) {
    long each = (channels / unit + threads - 1) / threads * unit;
    return LEAST(PANEL, each);
}

// ---- int8 x int8 ----

// Codes [rows, in] in the order of the second factor: [rows / 16, in / 64, 16 fours of input channels, 16 rows, 4]. Rows
// that a pair of tiles lacks are 0.
static void order_rows(const int8_t *x, int32_t *ordered, long rows, long in, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long m = 0; m < (rows + PAIR - 1) / PAIR * PAIR; m++) {
        int32_t *to = ordered + m / SIDE * SIDE * in / 4 + m % SIDE;
        EACH(k, in / 4) {
            int32_t four = 0;
            if (m < rows) memcpy(&four, x + m * in + 4 * k, 4);
            to[k * SIDE] = four;
        }
    }
}

// sums [4, channel, row] += products of `steps` tiles: w [steps, 2, BYTES], of x two rows of tiles. MULTIPLY tells of what.
#define ADD_TILES(MULTIPLY, w, x0, x1, sums, steps) \
    LOAD_SUMS(sums); \
    EACH(k, steps) { \
        LOAD(4, (w) + 2 * k * BYTES); \
        LOAD(6, (x0) + k * BYTES); \
        MULTIPLY(0, 4, 6); \
        LOAD(7, (x1) + k * BYTES); \
        MULTIPLY(1, 4, 7); \
        LOAD(5, (w) + (2 * k + 1) * BYTES); \
        MULTIPLY(2, 5, 6); \
        MULTIPLY(3, 5, 7); \
    } \
    STORE_SUMS(sums)

// bf16 of SIDE channels of one row, whose sums lie SIDE apart.
INLINE void finish(const int32_t *sums, float row_scale, const bf16 *scales, const bf16 *bias, bf16 *out) {
    const __m512i apart = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    __m512 value = _mm512_cvtepi32_ps(_mm512_i32gather_epi32(apart, sums, 4));
    value = _mm512_mul_ps(_mm512_mul_ps(value, widen16(scales)), _mm512_set1_ps(row_scale));
    if (bias) value = _mm512_add_ps(value, widen16(bias));
    _mm256_storeu_si256((void *)out, (__m256i)_mm512_cvtneps_pbh(value));
}

// w: in tiles [channels / 4, in / 64, 4, 64]; channels are a multiple of PAIR, `in` of TILE.
void int8_tiles(const int8_t *x, const float *row_scales, const int8_t *w, const bf16 *scales, const bf16 *bias,
                bf16 *out, long rows, long in, long channels, int threads) {
    long all = (rows + PAIR - 1) / PAIR * PAIR, panel = share(channels, PAIR, threads);
    int8_t *ordered = aligned_alloc(64, all * in);
    order_rows(x, (int32_t *)ordered, rows, in, threads);
#pragma omp parallel num_threads(threads)
    {
        int8_t *some = aligned_alloc(64, PANEL * DEPTH);                        // [wide / PAIR, steps, 2, BYTES]
        int32_t *sums = aligned_alloc(64, sizeof(int32_t) * PANEL * BLOCK);  // [block / PAIR, wide / PAIR, 4, SIDE, SIDE]
        configure();
#pragma omp for schedule(dynamic)
        for (long n = 0; n < channels; n += panel)
            for (long first = 0; first < all; first += BLOCK) {
                long block = LEAST(BLOCK, all - first), wide = LEAST(panel, channels - n);
                memset(sums, 0, sizeof(int32_t) * wide * block);
                for (long start = 0; start < in; start += DEPTH) {
                    long depth = LEAST(DEPTH, in - start);
                    EACH(c, wide / 4) EACH(k, depth / TILE)
                        memcpy(some + c / 8 * PAIR * depth + (2 * k + c / 4 % 2) * BYTES + c % 4 * 4 * TILE,
                               w + (n + 4 * c) * in + 4 * (start + k * TILE), 4 * TILE);
                    for (long m = 0; m < block; m += PAIR) {
                        const int8_t *from = ordered + (first + m) * in + SIDE * start;
                        for (long c = 0; c < wide; c += PAIR) {
                            ADD_TILES(MULTIPLY_INT8, some + c * depth, from, from + SIDE * in, sums + m * wide + c * PAIR, depth / TILE);
                        }
                    }
                }
                EACH(m, LEAST(block, rows - first)) for (long c = 0; c < wide; c += SIDE) {
                    long at = n + c;
                    const int32_t *own = sums + m / PAIR * PAIR * wide + c / PAIR * PAIR * PAIR + c / SIDE % 2 * 512;
                    own += m / SIDE % 2 * 256 + m % SIDE;
                    finish(own, row_scales[first + m], scales + at, bias ? bias + at : NULL, out + (first + m) * channels + at);
                }
            }
        __asm__ volatile("tilerelease" ::);
        free(some);
        free(sums);
    }
    free(ordered);
}

// ---- bf16 x int8, one scale for each channel ----

enum { WIDE = 64, HALF = TILE / 2 };  // channels of a block of int4, numbers in a row of a register

// The codes of one channel, 64 input channels at a time and 4 * 64 bytes apart, as bf16: exactly.
INLINE void widen_codes(const int8_t *from, bf16 *to, long depth) {
    for (long k = 0; k < depth; k += HALF) {
        const __m128i *some = (const __m128i *)(from + k / TILE * 4 * TILE + k % TILE);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(some)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(some + 1)));
        _mm512_store_si512(to + k / HALF * 2 * SIDE * HALF, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// bf16 of SIDE channels of one row, whose sums lie SIDE apart.
INLINE void finish_wide(const float *sums, float row_sum, const bf16 *scales, const float *offsets, const bf16 *bias,
                        bf16 *out) {
    const __m512i apart = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    __m512 value = _mm512_mul_ps(_mm512_i32gather_ps(apart, sums, 4), widen16(scales));
    if (offsets) value = _mm512_fmadd_ps(_mm512_set1_ps(row_sum), _mm512_loadu_ps(offsets), value);
    if (bias) value = _mm512_add_ps(value, widen16(bias));
    _mm256_storeu_si256((void *)out, (__m256i)_mm512_cvtneps_pbh(value));
}

// w: in tiles [channels / 4, in / 64, 4, 64], scales and offsets [channels]; channels are a multiple of PAIR, `in` of TILE.
void int8_wide_tiles(const bf16 *x, const int8_t *w, const bf16 *scales, const float *offsets, const bf16 *bias,
                     bf16 *out, long rows, long in, long channels, int threads) {
    enum { STRETCH = 512 };
    long all = (rows + PAIR - 1) / PAIR * PAIR, panel = share(channels, PAIR, threads);
    bf16 *ordered = aligned_alloc(64, sizeof(bf16) * all * in);  // [rows / 16, in / 32, 16 pairs of input channels, 16 rows, 2]
    order_rows((const int8_t *)x, (int32_t *)ordered, rows, sizeof(bf16) * in, threads);
    float *row_sums = malloc(sizeof(float) * rows);
#pragma omp parallel for num_threads(threads)
    EACH(m, rows) row_sums[m] = offsets ? sum_of(x + m * in, in) : 0;
#pragma omp parallel num_threads(threads)
    {
        bf16 *some = aligned_alloc(64, sizeof(bf16) * PANEL * STRETCH);  // [wide / PAIR, steps, 2, SIDE, HALF]
        float *sums = aligned_alloc(64, sizeof(float) * PANEL * BLOCK);  // [block / PAIR, wide / PAIR, 4, SIDE, SIDE]
        configure();
#pragma omp for schedule(dynamic)
        for (long n = 0; n < channels; n += panel)
            for (long first = 0; first < all; first += BLOCK) {
                long block = LEAST(BLOCK, all - first), wide = LEAST(panel, channels - n);
                memset(sums, 0, sizeof(float) * wide * block);
                for (long start = 0; start < in; start += STRETCH) {
                    long depth = LEAST(STRETCH, in - start);
                    EACH(c, wide)
                        widen_codes(w + (n + c / 4 * 4) * in + 4 * start + c % 4 * TILE,
                                    some + c / PAIR * PAIR * depth + (c / SIDE % 2 * SIDE + c % SIDE) * HALF, depth);
                    for (long m = 0; m < block; m += PAIR) {
                        const bf16 *from = ordered + (first + m) * in + SIDE * start;
                        for (long c = 0; c < wide; c += PAIR) {
                            ADD_TILES(MULTIPLY_BF16, (const char *)(some + c * depth), (const char *)from,
                                      (const char *)(from + SIDE * in), sums + m * wide + c * PAIR, depth / HALF);
                        }
                    }
                }
                EACH(m, LEAST(block, rows - first)) for (long c = 0; c < wide; c += SIDE) {
                    long at = n + c;
                    const float *own = sums + m / PAIR * PAIR * wide + c / PAIR * PAIR * PAIR + c / SIDE % 2 * 512;
                    own += m / SIDE % 2 * 256 + m % SIDE;
                    finish_wide(own, row_sums[first + m], scales + at, offsets ? offsets + at : NULL, bias ? bias + at : NULL,
                                out + (first + m) * channels + at);
                }
            }
        __asm__ volatile("tilerelease" ::);
        free(some);
        free(sums);
    }
    free(ordered);
    free(row_sums);
}

// ---- bf16 x int4, in blocks of 64 channels as in int4.c ----

// Numbers [rows, in] in the order of the first factor, [rows / 16, in / 32, 16, 32]: rows that lie far apart would push each
// other out of the cache. Rows that a pair of tiles lacks are 0.
static void order_numbers(const bf16 *x, bf16 *ordered, long rows, long in, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long m = 0; m < (rows + PAIR - 1) / PAIR * PAIR; m++)
        for (long k = 0; k < in; k += HALF) {
            bf16 *to = ordered + m / SIDE * SIDE * in + k * SIDE + m % SIDE * HALF;
            if (m < rows) memcpy(to, x + m * in + k, TILE);
            else memset(to, 0, TILE);
        }
}

// sums [4, row, channel] += products of `steps` tiles: of x two rows of tiles, w [steps, SIDE pairs, PAIR, 2].
INLINE void add_numbers(const bf16 *x0, const bf16 *x1, const bf16 *w, float *sums, long steps) {
    LOAD_SUMS(sums);
    EACH(k, steps) {
        LOAD(4, x0 + k * SIDE * HALF);
        LOAD_APART(6, w + k * HALF * PAIR, 2 * TILE);
        MULTIPLY_BF16(0, 4, 6);
        LOAD_APART(7, w + k * HALF * PAIR + HALF, 2 * TILE);
        MULTIPLY_BF16(1, 4, 7);
        LOAD(5, x1 + k * SIDE * HALF);
        MULTIPLY_BF16(2, 5, 6);
        MULTIPLY_BF16(3, 5, 7);
    }
    STORE_SUMS(sums);
}

// out: rows lie `apart` numbers from each other; channels are a multiple of WIDE, `in` of HALF and of the group. Codes of 2
// bits (int2.c) become codes of 4 some at a time.
void int4_tiles(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, bf16 *out, long rows, long in,
                long group, long channels, long apart, long bits, int threads) {
    enum { STRETCH = 512 };  // a multiple of every group
    long all = (rows + PAIR - 1) / PAIR * PAIR, panel = share(channels, WIDE, threads);
    bf16 *ordered = aligned_alloc(64, sizeof(bf16) * all * in);
    order_numbers(x, ordered, rows, in, threads);
#pragma omp parallel num_threads(threads)
    {
        uint8_t *codes = aligned_alloc(64, PANEL * STRETCH / 2);
        bf16 *some = aligned_alloc(64, sizeof(bf16) * PANEL * STRETCH);  // [wide / PAIR, depth / 2, PAIR, 2]
        float *sums = aligned_alloc(64, sizeof(float) * PANEL * BLOCK);  // [block / PAIR, wide / PAIR, 4, SIDE, SIDE]
        configure();
#pragma omp for schedule(dynamic)
        for (long n = 0; n < channels; n += panel)
            for (long first = 0; first < all; first += BLOCK) {
                long block = LEAST(BLOCK, all - first), wide = LEAST(panel, channels - n);
                memset(sums, 0, sizeof(float) * wide * block);
                for (long start = 0; start < in; start += STRETCH) {
                    long depth = LEAST(STRETCH, in - start);
                    if (bits == 4)
                        int4_expand(packed, scales_zeros, some, in, group, channels, n, wide / WIDE, start, depth, PAIR, 1);
                    else {
                        const bf16 *own = scales_zeros + (start / group * channels + n) * 2;
                        EACH(b, wide / WIDE)
                            int2_widen(packed + (n + b * WIDE) / 4 * in + start * 16, codes + b * depth * 32, depth * 16, 1);
                        int4_expand(codes, own, some, depth, group, channels, 0, wide / WIDE, 0, depth, PAIR, 1);
                    }
                    for (long m = 0; m < block; m += PAIR) {
                        const bf16 *from = ordered + (first + m) * in + SIDE * start;
                        for (long c = 0; c < wide; c += PAIR)
                            add_numbers(from, from + SIDE * in, some + c * depth, sums + m * wide + c * PAIR, depth / HALF);
                    }
                }
                EACH(m, LEAST(block, rows - first)) for (long c = 0; c < wide; c += SIDE) {
                    const float *own = sums + m / PAIR * PAIR * wide + c / PAIR * PAIR * PAIR + c / SIDE % 2 * 256;
                    __m512 value = _mm512_load_ps(own + m / SIDE % 2 * 512 + m % SIDE * SIDE);
                    _mm256_storeu_si256((void *)(out + (first + m) * apart + n + c), (__m256i)_mm512_cvtneps_pbh(value));
                }
            }
        __asm__ volatile("tilerelease" ::);
        free(codes);
        free(some);
        free(sums);
    }
    free(ordered);
}

#endif
