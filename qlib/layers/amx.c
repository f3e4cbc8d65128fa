// int8 x int8 on processors with AMX, whose tile products make eight times as much at once as vectors.
// Sums are exact, as in kernels.c, which holds the same product for all other processors, and for few rows.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

#if !defined(__AMX_INT8__)

int amx_ready(int threads) { return 0; }
void int8_tiles(const int8_t *x, const float *row_scales, const int8_t *w, const bf16 *scales, const bf16 *bias,
                bf16 *out, long rows, long in, long channels, int threads) {}

#else

#define INLINE static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define EACH(i, count) for (long i = 0; i < (count); i++)

// A register holds 16 rows of 64 bytes. Four of them sum up PAIR channels x PAIR rows.
enum { SIDE = 16, TILE = 64, BYTES = SIDE * TILE, PAIR = 2 * SIDE };
// Input channels and rows summed before moving on: what is read again and again stays in the first two caches.
enum { DEPTH = 1024, BLOCK = 256 };

// Whether the system lets this process use the tiles: it must be asked once.
int amx_ready(int threads) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

INLINE void configure(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    EACH(i, 8) shape.bytes[i] = TILE, shape.rows[i] = SIDE;
    _tile_loadconfig(&shape);
}

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

// sums [4, channel, row] += products of `steps` tiles: w [steps, 2, BYTES], of x two rows of tiles.
INLINE void add_products(const int8_t *w, const int8_t *x0, const int8_t *x1, int32_t *sums, long steps) {
    _tile_loadd(0, sums, TILE);
    _tile_loadd(1, sums + 256, TILE);
    _tile_loadd(2, sums + 512, TILE);
    _tile_loadd(3, sums + 768, TILE);
    EACH(k, steps) {
        _tile_loadd(4, w + 2 * k * BYTES, TILE);
        _tile_loadd(6, x0 + k * BYTES, TILE);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, x1 + k * BYTES, TILE);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, w + (2 * k + 1) * BYTES, TILE);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, TILE);
    _tile_stored(1, sums + 256, TILE);
    _tile_stored(2, sums + 512, TILE);
    _tile_stored(3, sums + 768, TILE);
}

// bf16 of SIDE channels of one row, whose sums lie SIDE apart.
INLINE void finish(const int32_t *sums, float row_scale, const bf16 *scales, const bf16 *bias, bf16 *out) {
    const __m512i apart = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    __m512i scale = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)scales)), 16);
    __m512 value = _mm512_cvtepi32_ps(_mm512_i32gather_epi32(apart, sums, 4));
    value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_castsi512_ps(scale)), _mm512_set1_ps(row_scale));
    if (bias) {
        __m512i add = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)bias)), 16);
        value = _mm512_add_ps(value, _mm512_castsi512_ps(add));
    }
    _mm256_storeu_si256((void *)out, (__m256i)_mm512_cvtneps_pbh(value));
}

// w: in tiles [channels / 4, in / 64, 4, 64]; channels are a multiple of PAIR, `in` of TILE.
void int8_tiles(const int8_t *x, const float *row_scales, const int8_t *w, const bf16 *scales, const bf16 *bias,
                bf16 *out, long rows, long in, long channels, int threads) {
    long all = (rows + PAIR - 1) / PAIR * PAIR;
    int8_t *ordered = aligned_alloc(64, all * in);
    order_rows(x, (int32_t *)ordered, rows, in, threads);
#pragma omp parallel num_threads(threads)
    {
        int8_t *some = aligned_alloc(64, PAIR * DEPTH);
        int32_t *sums = aligned_alloc(64, sizeof(int32_t) * PAIR * BLOCK);  // [rows / PAIR, 4, SIDE, SIDE]
        configure();
#pragma omp for schedule(dynamic)
        for (long n = 0; n < channels; n += PAIR)
            for (long first = 0; first < all; first += BLOCK) {
                long block = LEAST(BLOCK, all - first);
                memset(sums, 0, sizeof(int32_t) * PAIR * block);
                for (long start = 0; start < in; start += DEPTH) {
                    long depth = LEAST(DEPTH, in - start);
                    EACH(c, PAIR / 4) EACH(k, depth / TILE)
                        memcpy(some + (2 * k + c / 4) * BYTES + c % 4 * 4 * TILE,
                               w + (n + 4 * c) * in + 4 * (start + k * TILE), 4 * TILE);
                    for (long m = 0; m < block; m += PAIR) {
                        const int8_t *from = ordered + (first + m) * in + SIDE * start;
                        add_products(some, from, from + SIDE * in, sums + PAIR * m, depth / TILE);
                    }
                }
                EACH(m, LEAST(block, rows - first)) {
                    const int32_t *own = sums + PAIR * (m / PAIR * PAIR) + m / SIDE % 2 * 256 + m % SIDE;
                    bf16 *to = out + (first + m) * channels + n;
                    EACH(half, 2)
                        finish(own + 512 * half, row_scales[first + m], scales + n + SIDE * half,
                               bias ? bias + n + SIDE * half : NULL, to + SIDE * half);
                }
            }
        _tile_release();
        free(some);
        free(sums);
    }
    free(ordered);
}

#endif
