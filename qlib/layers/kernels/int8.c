// Products with int8 weights, of activations rounded to int8 and of a few rows of bf16.

#include "common.h"

// `call` with the height of a tile as a constant, so that its loops unroll
#define TILES(call) \
    switch (tall) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        default: call(4); \
    }

enum { WIDE = 4, TALL = 4 };  // channels and rows of a tile, whose sums stay in registers

// ---- int8 activations: x = code * scale of the row, scale = largest magnitude / 127 ----

void quantize_rows(const bf16 *x, int8_t *codes, float *scales, int32_t *sums, long rows, long in, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++) {
        const bf16 *row = x + m * in;
        uint32_t largest = 0;
        int32_t sum = 0;
        EACH(k, in) largest = (row[k] & 0x7fff) > largest ? row[k] & 0x7fff : largest;
        scales[m] = largest ? widen(largest) / 127 : 1;
        EACH(k, in) {
            int32_t code = __builtin_rintf(widen(row[k]) / scales[m]);
            codes[m * in + k] = code;
            sum += code;
        }
        sums[m] = sum;
    }
}

// ---- int8 x int8, summed exactly in int32 ----

// Codes lie in tiles (int8_tiles.py), so that four channels are read as one stream: [channels / 4, in / 64, 4, 64].
enum { TILE = 64 };
// Channels whose codes stay in the second-level cache; input channels and rows summed before moving on.
enum { PANEL = 64, DEPTH = 4096, BLOCK = 256 };

INLINE __m512i add_neighbours(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

INLINE __m128i sum_each(const __m512i *four) {  // the sums of four vectors
    __m512i a = add_neighbours(four[0], four[1]), b = add_neighbours(four[2], four[3]);
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}


// vpdpbusd wants one side unsigned: 128 is added to the weights' codes, and taken off at the end.
INLINE void dot_tile(const int8_t *x, const int8_t *w, long in, long depth, __m512i (*sums)[WIDE], const int tall,
                     const int once) {
    for (long k = 0; k < depth; k += TILE) {
        __m512i weight[WIDE];
        EACH(j, WIDE) {
            const int8_t *codes = w + WIDE * k + TILE * j;
            if (once) _mm_prefetch((const char *)codes + AHEAD, WHERE);
            weight[j] = _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8((char)128));
        }
        EACH(i, tall) {
            __m512i row = _mm512_loadu_si512(x + i * in + k);
            EACH(j, WIDE) ADD_PRODUCTS(sums[i][j], weight[j], row);
        }
    }
}

INLINE void add_tile(const int8_t *x, const int8_t *w, long in, long depth, int32_t *out, const int tall) {
    __m512i sums[TALL][WIDE];
    EACH(i, tall) EACH(j, WIDE) sums[i][j] = _mm512_setzero_si512();
    dot_tile(x, w, in, depth, sums, tall, tall == 1);
    EACH(i, tall) {
        __m128i *at = (__m128i *)(out + i * PANEL);
        _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), sum_each(sums[i])));
    }
}

void int8_dot(const int8_t *x, const float *row_scales, const int32_t *row_sums, const int8_t *w, const bf16 *scales,
              const bf16 *bias, bf16 *out, long rows, long in, long channels, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long n = 0; n < channels; n += PANEL) {
        int32_t sums[BLOCK * PANEL];
        long stretch = rows > TALL ? DEPTH : in;  // weights that are used once are read in order
        long wide = LEAST(PANEL, channels - n);
        for (long first = 0; first < rows; first += BLOCK) {
            long block = LEAST(BLOCK, rows - first);
            memset(sums, 0, sizeof(int32_t) * block * PANEL);
            for (long k = 0; k < in; k += stretch)
                for (long m = 0; m < block; m += TALL)
                    for (long j = 0; j < wide; j += WIDE) {
                        long tall = LEAST(TALL, block - m), depth = LEAST(stretch, in - k);
                        const int8_t *tile = w + (n + j) * in + WIDE * k;
#define TILED(t) add_tile(x + (first + m) * in + k, tile, in, depth, sums + m * PANEL + j, t)
                        TILES(TILED)
#undef TILED
                    }
            for (long m = first; m < first + block; m++)
                EACH(j, wide) {
                    float value = sums[(m - first) * PANEL + j] - 128 * row_sums[m];
                    value = value * widen(scales[n + j]) * row_scales[m];
                    out[m * channels + n + j] = narrow(value + (bias ? widen(bias[n + j]) : 0));
                }
        }
    }
}

// ---- int8 weights for a few rows of bf16 activations: reading the weights is all that counts ----


// What sums of a group start with, [groups, DIGITS]: it takes off what dot_tile adds to the weights.
static void start_sums(const int8_t *digits, __m512i *starts, long in, long group) {
    for (long start = 0; start < in; start += group)
        EACH(p, DIGITS) {
            __m512i sum = _mm512_setzero_si512();
            for (long k = start; k < start + group; k += 32) {
                __m512i some = _mm512_zextsi256_si512(_mm256_loadu_si256((const void *)(digits + p * in + k)));
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)128), some);
            }
            *starts++ = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
        }
}


INLINE void digits_tile(const int8_t *digits, const __m512i *starts, const int8_t *w, const bf16 *scales, long in,
                        long group, float unit, float *out) {
    __m512 totals[WIDE];
    EACH(j, WIDE) totals[j] = _mm512_setzero_ps();
    EACH(g, in / group) {
        __m512i sums[DIGITS][WIDE];
        EACH(p, DIGITS) EACH(j, WIDE) sums[p][j] = _mm512_load_si512(starts + g * DIGITS + p);
        dot_tile(digits + g * group, w + WIDE * g * group, in, group, sums, DIGITS, 1);
        EACH(j, WIDE) {
            __m512 scale = _mm512_set1_ps(widen(scales[j * (in / group) + g]));
            totals[j] = _mm512_fmadd_ps(join_digits(&sums[0][j], WIDE), scale, totals[j]);
        }
    }
    EACH(j, WIDE) out[j] = unit * _mm512_reduce_add_ps(totals[j]);
}

INLINE void rows_tile(const float *x, const int8_t *w, const bf16 *scales, long in, long group, float (*out)[WIDE],
                      const int tall) {
    __m512 sums[TALL][WIDE], part[TALL][WIDE];
    EACH(i, tall) EACH(j, WIDE) sums[i][j] = _mm512_setzero_ps();
    for (long start = 0; start < in; start += group) {
        EACH(i, tall) EACH(j, WIDE) part[i][j] = _mm512_setzero_ps();
        for (long k = start; k < start + group; k += 16)
            EACH(j, WIDE) {
                const int8_t *codes = w + WIDE * (k & -TILE) + TILE * j + (k & (TILE - 1));
                if (k % TILE == 0) _mm_prefetch((const char *)codes + AHEAD, WHERE);
                __m512 weight = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)codes)));
                EACH(i, tall)
                    part[i][j] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + i * in + k), part[i][j]);
            }
        EACH(j, WIDE) {
            __m512 scale = _mm512_set1_ps(widen(scales[j * (in / group) + start / group]));
            EACH(i, tall) sums[i][j] = _mm512_fmadd_ps(part[i][j], scale, sums[i][j]);
        }
    }
    EACH(i, tall) EACH(j, WIDE) out[i][j] = _mm512_reduce_add_ps(sums[i][j]);
}

void int8_rows(const bf16 *x, const int8_t *w, const bf16 *scales, const float *offsets, const bf16 *bias, bf16 *out,
               long rows, long in, long group, long channels, int threads) {
    long groups = in / group;
    float *wide = aligned_alloc(64, (sizeof(float) * rows * (in + groups) | 63) + 1);  // a vector in one cache line
    float *group_sums = wide + rows * in, unit = 0;
    int8_t *digits = (int8_t *)wide;
    int splits = rows == 1 && group % TILE == 0 && group >= LEAST_GROUP && group <= LONGEST;
    __m512i *starts = splits ? aligned_alloc(64, 64 * DIGITS * groups) : NULL;
    if (splits) {
        unit = split_row(x, digits, in);
        start_sums(digits, starts, in, group);
    } else EACH(i, rows * in) wide[i] = widen(x[i]);
    if (offsets) EACH(i, rows * groups) group_sums[i] = sum_of(x + i * group, group);
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < channels; n += WIDE)
        for (long first = 0; first < rows; first += TALL) {
            float sums[TALL][WIDE];
            long tall = LEAST(TALL, rows - first);
            const int8_t *tile = w + n * in;
            const bf16 *scale = scales + n * groups;
#define TILED(t) rows_tile(wide + first * in, tile, scale, in, group, sums, t)
            if (splits) digits_tile(digits, starts, tile, scale, in, group, unit, sums[0]);
            else TILES(TILED)
#undef TILED
            EACH(i, tall) EACH(j, WIDE) {
                float value = sums[i][j];
                const float *of_row = group_sums + (first + i) * groups;
                if (offsets) EACH(g, groups) value += of_row[g] * offsets[(n + j) * groups + g];
                out[(first + i) * channels + n + j] = narrow(value + (bias ? widen(bias[n + j]) : 0));
            }
        }
    free(wide);
    free(starts);
}
