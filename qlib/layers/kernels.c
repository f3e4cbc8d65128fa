// Products with packed weights on processors with AVX-512, VNNI and BF16. native.py builds this file and calls it.
//
// x is [rows, in], weights are [channels, in], results are bf16 [rows, channels]; `threads` share the channels.
// A null pointer stands for no offsets, or no bias. What sizes each function takes: see native.py.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__AVX512VNNI__) || !defined(__AVX512BF16__) || !defined(__AVX512VBMI__)
#error the processor lacks AVX-512 with VNNI, VBMI and BF16
#endif

#define INLINE static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define EACH(i, count) for (long i = 0; i < (count); i++)
// `call` with the height of a tile as a constant, so that its loops unroll
#define TILES(call) \
    switch (tall) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        default: call(4); \
    }

typedef uint16_t bf16;

enum { WIDE = 4, TALL = 4 };  // channels and rows of a tile, whose sums stay in registers

INLINE float widen(bf16 value) {
    union { uint32_t bits; float number; } both = {(uint32_t)value << 16};
    return both.number;
}

INLINE bf16 narrow(float value) {  // to nearest, ties to even
    union { float number; uint32_t bits; } both = {value};
    return (both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16;
}

INLINE __m512 widen16(const bf16 *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE __m512 widen_some(__mmask16 there, const bf16 *from) {  // 0 where nothing is
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE __m512 round16(__m512 x) {  // to bf16 and back
    __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE float sum_of(const bf16 *x, long count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    EACH(k, count) sum += widen(x[k]);
    return sum;
}

INLINE __m512 even_halves(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE __m512 odd_halves(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

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
// How weights are fetched before they are needed. Measured: Intel's processors with AMX fetch twice as fast into the
// second-level cache, AMD's faster past it.
#ifdef __AMX_TILE__
enum { AHEAD = 16384, WHERE = _MM_HINT_T1, WHERE_INT4 = _MM_HINT_T1, GROUP_AT_ONCE = 1 };
#else
enum { AHEAD = 4096, WHERE = _MM_HINT_NTA, WHERE_INT4 = _MM_HINT_T0, GROUP_AT_ONCE = 0 };
#endif

INLINE __m512i add_neighbours(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

INLINE __m128i sum_each(const __m512i *four) {  // the sums of four vectors
    __m512i a = add_neighbours(four[0], four[1]), b = add_neighbours(four[2], four[3]);
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Products of unsigned and signed bytes. By hand, because gcc spills the sums when it uses _mm512_dpbusd_epi32.
#define ADD_PRODUCTS(sum, plus, any) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(plus), "v"(any))

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

// One row is fixed-point numbers of 24 bits, as fine as sums in fp32 are: three int8 digits, multiplied exactly.
// Groups of few channels are not worth the trouble; longer ones than these could overflow.
enum { DIGITS = 3, BITS = 22, LONGEST = 65536, LEAST_GROUP = 512 };

// x = (digit 0 + 256 * digit 1 + 65536 * digit 2) * the unit that is returned; digits is [DIGITS, in].
static float split_row(const bf16 *x, int8_t *digits, long in) {
    bf16 largest = 0;
#pragma omp simd reduction(max : largest)
    EACH(k, in) largest = (x[k] & 0x7fff) > largest ? x[k] & 0x7fff : largest;
    if (largest >= 0x7f80) return NAN;  // infinite, or no number
    float unit = largest ? ldexpf(1, ilogbf(widen(largest)) + 1 - BITS) : 1;
    for (long k = 0; k < in; k += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(widen16(x + k), _mm512_set1_ps(unit)));  // rounds
        EACH(p, DIGITS) {
            __m128i digit = _mm512_cvtepi32_epi8(whole);  // the low byte
            _mm_storeu_si128((void *)(digits + p * in + k), digit);
            whole = _mm512_srai_epi32(_mm512_sub_epi32(whole, _mm512_cvtepi8_epi32(digit)), 8);
        }
    }
    return unit;
}

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

INLINE __m512 join_digits(const __m512i *sums, long apart) {  // sums of products with each digit, `apart` vectors from the next
    __m512 sum = _mm512_setzero_ps();
    for (long p = DIGITS - 1; p >= 0; p--)
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sums[p * apart]));
    return sum;
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

// ---- int4 as torch's CPU kernel keeps it (int4_blocks.py), weight = (code - 8) * scale + zero ----
// A block is 64 channels, [in, 32] bytes: channel j in the low half of byte j, channel j + 32 in the high half.
// Scales and zeros lie side by side: bf16 [groups, channels, 2].

// 64 bytes are two input channels, 128 are four. Taken in this order, those of 16 output channels (and of 16 more in the
// high halves) lie side by side, `width` bytes for each; where there are two, the odd bytes mean nothing.
INLINE __m512i side_by_side(long half, const int width) {
    uint8_t places[64];
    EACH(i, 64) places[i] = i / 4 + 16 * half + (width == 1 ? 32 * (i % 4) : i & 2 ? 32 : 0);
    return _mm512_loadu_si512(places);
}

// One row, in digits. vpdpbusd takes four input channels of 16 output channels: whole bytes, and bytes without their low
// halves, which are 16 times the codes in the high ones; what the low ones make is the difference. The zeros, and the 8,
// are multiplied with the activations' sum over a group.
void int4_row(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, const bf16 *bias, bf16 *out, long in,
              long group, long channels, int threads) {
    long groups = in / group;
    int8_t *digits = malloc(DIGITS * in);
    float *group_sums = malloc(sizeof(float) * groups), unit = split_row(x, digits, in);
    EACH(g, groups) group_sums[g] = sum_of(x + g * group, group) / unit;
    const __m512i high = _mm512_set1_epi8((char)0xf0), order[2] = {side_by_side(0, 1), side_by_side(1, 1)};
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < channels; n += 64) {
        const uint8_t *block = packed + n / 2 * in;
        __m512 totals[4];
        EACH(j, 4) totals[j] = _mm512_setzero_ps();
        EACH(g, groups) {
            // the next group's lie far from these: at the end, the first ones of the next block
            const bf16 *next = scales_zeros + (g + 1 < groups ? (g + 1) * channels + n : n + 64) * 2;
            EACH(j, 4) _mm_prefetch((const char *)(next + j * 32), _MM_HINT_T0);
            __m512i sums[DIGITS][4];
            EACH(p, DIGITS) EACH(j, 4) sums[p][j] = _mm512_setzero_si512();
            if (GROUP_AT_ONCE)
                EACH(i, group / 2) _mm_prefetch((const char *)block + g * group * 32 + 64 * i + AHEAD, WHERE_INT4);
            for (long k = g * group; k < (g + 1) * group; k += 4) {
                const uint8_t *at = block + k * 32;
                if (!GROUP_AT_ONCE) EACH(i, 2) _mm_prefetch((const char *)at + 64 * i + AHEAD, WHERE_INT4);
                __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64), bytes[4];
                EACH(half, 2) {
                    bytes[half] = _mm512_permutex2var_epi8(first, order[half], second);
                    bytes[half + 2] = _mm512_and_si512(bytes[half], high);
                }
                EACH(p, DIGITS) {
                    int32_t four;
                    memcpy(&four, digits + p * in + k, sizeof(four));
                    __m512i row = _mm512_set1_epi32(four);
                    EACH(j, 4) ADD_PRODUCTS(sums[p][j], bytes[j], row);
                }
            }
            EACH(p, DIGITS) EACH(half, 2) sums[p][half] = _mm512_sub_epi32(sums[p][half], sums[p][half + 2]);
            EACH(j, 4) {
                __m512i both = _mm512_loadu_si512(scales_zeros + (g * channels + n + j * 16) * 2);
                __m512 scale = even_halves(both), rest = _mm512_fnmadd_ps(_mm512_set1_ps(8), scale, odd_halves(both));
                __m512 sum = _mm512_mul_ps(join_digits(&sums[0][j], 4), _mm512_set1_ps(j < 2 ? 1 : 1.f / 16));
                totals[j] = _mm512_fmadd_ps(sum, scale, totals[j]);
                totals[j] = _mm512_fmadd_ps(_mm512_set1_ps(group_sums[g]), rest, totals[j]);
            }
        }
        EACH(j, 4) {
            float last[16];
            _mm512_storeu_ps(last, totals[j]);
            EACH(i, 16) out[n + j * 16 + i] = narrow(unit * last[i] + (bias ? widen(bias[n + j * 16 + i]) : 0));
        }
    }
    free(digits);
    free(group_sums);
}

// The weights of `depth` input channels from `start` on, whole groups, of `blocks` blocks from channel `first` on, rounded
// to bf16, in the order of oneDNN's own kernels, which take `wide` channels (32 or 64) at once: out
// [blocks * 64 / wide, depth / 2, wide, 2].
void int4_expand(const uint8_t *packed, const bf16 *scales_zeros, bf16 *out, long in, long group, long channels,
                 long first, long blocks, long start, long depth, long wide, int threads) {
    uint16_t places[32];
    EACH(i, 32) places[i] = i / 2 + i % 2 * 16;
    const __m512i zip = _mm512_loadu_si512(places), order[2] = {side_by_side(0, 2), side_by_side(1, 2)};
    // as the last bits of a bf16 number, a code is 128 + code
    const __m512i bits = _mm512_set1_epi16(15), number = _mm512_set1_epi16(0x4300);
#pragma omp parallel for collapse(2) num_threads(threads)
    EACH(block, blocks)
        for (long done = 0; done < depth; done += group) {
            long n = first + block * 64;
            __m512 scale[4], zero[4];
            EACH(j, 4) {
                __m512i both = _mm512_loadu_si512(scales_zeros + ((start + done) / group * channels + n + j * 16) * 2);
                scale[j] = even_halves(both);
                zero[j] = _mm512_fnmadd_ps(_mm512_set1_ps(128 + 8), scale[j], odd_halves(both));
            }
            for (long k = done; k < done + group; k += 2) {
                __m512i bytes = _mm512_loadu_si512(packed + n / 2 * in + (start + k) * 32);
                EACH(j, 4) {  // low halves of the bytes are the first 32 channels
                    __m512i codes = _mm512_permutexvar_epi8(order[j % 2], bytes);
                    if (j / 2) codes = _mm512_srli_epi16(codes, 4);
                    codes = _mm512_ternarylogic_epi32(codes, bits, number, 0xea);  // (codes & bits) | number
                    __m512 even = _mm512_fmadd_ps(even_halves(codes), scale[j], zero[j]);
                    __m512 odd = _mm512_fmadd_ps(odd_halves(codes), scale[j], zero[j]);
                    __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                    long channel = block * 64 + j * 16, stripe = channel / wide;
                    bf16 *to = out + (stripe * depth + k) * wide + channel % wide * 2;
                    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(zip, pair));
                }
            }
        }
}

// ---- decoder blocks, for one token: short work, of which Python would make a long one ----

INLINE __m512 exp16(__m512 x) {  // 2^whole * e^rest, relative error below 3e-7
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88)), _mm512_set1_ps(-88));
    __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x), sum = _mm512_set1_ps(1);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);  // log 2 in two parts
    for (int n = 7; n; n--) sum = _mm512_fmadd_ps(_mm512_mul_ps(rest, _mm512_set1_ps(1.f / n)), sum, _mm512_set1_ps(1));
    return _mm512_scalef_ps(sum, whole);
}

void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, float epsilon, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (long m = 0; m < rows; m++) {
        const bf16 *row = x + m * width;
        __m512 squares = _mm512_setzero_ps();
        for (long k = 0; k < width; k += 16) squares = _mm512_fmadd_ps(widen16(row + k), widen16(row + k), squares);
        float factor = 1 / sqrtf(_mm512_reduce_add_ps(squares) / width + epsilon);
        // rounded before the weight multiplies, as transformers does
        EACH(k, width) out[m * width + k] = narrow(widen(narrow(widen(row[k]) * factor)) * widen(weight[k]));
    }
}

// Turn q [heads, dim] and k [kv_heads, dim] by their position (cos, sin: [dim], the first half of sin negative), put k
// and v into the cache [kv_heads, capacity, dim] behind the `used` tokens there, and attend to all of them.
void attend(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *cos, const bf16 *sin, bf16 *keys, bf16 *values,
            bf16 *out, long heads, long kv_heads, long dim, long capacity, long used, int threads) {
    EACH(h, kv_heads) EACH(d, dim) {
        float other = widen(k[h * dim + (d + dim / 2) % dim]);
        keys[(h * capacity + used) * dim + d] = narrow(widen(k[h * dim + d]) * widen(cos[d]) + other * widen(sin[d]));
        values[(h * capacity + used) * dim + d] = v[h * dim + d];
    }
#pragma omp parallel for num_threads(threads)
    for (long h = 0; h < heads; h++) {
        const bf16 *all_keys = keys + h * kv_heads / heads * capacity * dim;
        const bf16 *all_values = values + h * kv_heads / heads * capacity * dim;
        float query[dim], mixed[dim], *scores = malloc(sizeof(float) * (used + 16)), most = -INFINITY, total = 0;
        EACH(d, dim) {
            float other = widen(q[h * dim + (d + dim / 2) % dim]);
            query[d] = (widen(q[h * dim + d]) * widen(cos[d]) + other * widen(sin[d])) / sqrtf(dim);
            mixed[d] = 0;
        }
        EACH(t, used + 1) {
            __m512 sum = _mm512_setzero_ps();
            for (long d = 0; d < dim; d += 16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), widen16(all_keys + t * dim + d), sum);
            scores[t] = _mm512_reduce_add_ps(sum);
            most = scores[t] > most ? scores[t] : most;
        }
        for (long t = 0; t <= used; t += 16)  // the last ones may be past the end: never read
            _mm512_storeu_ps(scores + t, exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(most))));
        EACH(t, used + 1) {
            total += scores[t];
            EACH(d, dim) mixed[d] += scores[t] * widen(all_values[t * dim + d]);
        }
        EACH(d, dim) out[h * dim + d] = narrow(mixed[d] / total);
        free(scores);
    }
}

// Rows of scores [rows, keys] become weights, in place. Row r sees `first` keys and r % piece + 1 more; others get 0.
void causal_softmax(bf16 *scores, long rows, long keys, long first, long piece, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *numbers = malloc(sizeof(float) * (keys + 16));
#pragma omp for
        for (long r = 0; r < rows; r++) {
            bf16 *row = scores + r * keys;
            long seen = LEAST(first + r % piece + 1, keys);
            __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
            for (long k = 0; k < seen; k += 16) {
                __mmask16 there = seen - k < 16 ? (1 << (seen - k)) - 1 : 0xffff;
                __m512 some = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, widen_some(there, row + k));
                _mm512_storeu_ps(numbers + k, some);
                most = _mm512_max_ps(most, some);
            }
            most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
            for (long k = 0; k < seen; k += 16) {
                __m512 some = _mm512_loadu_ps(numbers + k);
                __mmask16 there = _mm512_cmp_ps_mask(some, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
                some = _mm512_maskz_mov_ps(there, exp16(_mm512_sub_ps(some, most)));
                _mm512_storeu_ps(numbers + k, some);
                total = _mm512_add_ps(total, some);
            }
            __m512 factor = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
            for (long k = 0; k < seen; k += 16) {
                __mmask16 there = keys - k < 16 ? (1 << (keys - k)) - 1 : 0xffff;
                __m512 some = _mm512_mul_ps(_mm512_loadu_ps(numbers + k), factor);
                _mm256_mask_storeu_epi16(row + k, there, (__m256i)_mm512_cvtneps_pbh(some));
            }
            long done = (seen + 15) / 16 * 16;
            if (done < keys) memset(row + done, 0, sizeof(bf16) * (keys - done));
        }
        free(numbers);
    }
}

// Gradients of weights [rows, keys] become those of scores, in place: dS = P (dP - sum(P dP)); see causal_softmax.
void causal_softmax_backward(const bf16 *weights, bf16 *gradients, long rows, long keys, long first, long piece,
                             int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const bf16 *p = weights + r * keys;
        bf16 *d = gradients + r * keys;
        long seen = LEAST(first + r % piece + 1, keys), last = (seen - 1) / 16 * 16;
        __mmask16 tail = keys - last < 16 ? (1 << (keys - last)) - 1 : 0xffff;  // weights behind `seen` are 0
        __m512 sum = _mm512_setzero_ps();
        for (long k = 0; k < seen; k += 16) {
            __mmask16 there = k == last ? tail : 0xffff;
            sum = _mm512_fmadd_ps(widen_some(there, p + k), widen_some(there, d + k), sum);
        }
        sum = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (long k = 0; k < seen; k += 16) {
            __mmask16 there = k == last ? tail : 0xffff;
            __m512 some = _mm512_mul_ps(widen_some(there, p + k), _mm512_sub_ps(widen_some(there, d + k), sum));
            _mm256_mask_storeu_epi16(d + k, there, (__m256i)_mm512_cvtneps_pbh(some));
        }
        if (last + 16 < keys) memset(d + last + 16, 0, sizeof(bf16) * (keys - last - 16));
    }
}

// A linear that multiplies one row. `kind`: 0 int4_row, 1 int8_rows, 2 int8_dot.
typedef struct {
    long kind, in, channels, group;
    const void *codes;
    const bf16 *scales, *bias;
    const float *offsets;
} linear;

typedef struct {
    linear q, k, v, o, gate, up, down;
    const bf16 *first_norm, *second_norm;
    bf16 *keys, *values;
    long heads, kv_heads, dim, capacity;
    float epsilon;
} decoder_block;

static void multiply(const linear *l, const bf16 *x, bf16 *out, int threads) {
    if (l->kind == 0) int4_row(x, l->codes, l->scales, l->bias, out, l->in, l->group, l->channels, threads);
    if (l->kind == 1)
        int8_rows(x, l->codes, l->scales, l->offsets, l->bias, out, 1, l->in, l->group, l->channels, threads);
    if (l->kind == 2) {
        int8_t *codes = aligned_alloc(64, (l->in | 63) + 1);
        float scale;
        int32_t sum;
        quantize_rows(x, codes, &scale, &sum, 1, l->in, 1);
        int8_dot(codes, &scale, &sum, l->codes, l->scales, l->bias, out, 1, l->in, l->channels, threads);
        free(codes);
    }
}

static void add(bf16 *x, const bf16 *more, long count) { EACH(k, count) x[k] = narrow(widen(x[k]) + widen(more[k])); }

// All blocks on one token x [hidden], in place. Values are rounded to bf16 wherever torch's operators round them.
void decode(const decoder_block *blocks, bf16 *x, const bf16 *cos, const bf16 *sin, long count, long used,
            int threads) {
    for (const decoder_block *b = blocks; b < blocks + count; b++) {
        long hidden = b->q.in, wide = b->gate.channels, size = b->heads * b->dim, kv_size = b->kv_heads * b->dim;
        bf16 *normed = malloc(sizeof(bf16) * 2 * (hidden + size + kv_size + wide)), *more = normed + hidden;
        bf16 *q = more + hidden, *mixed = q + size, *k = mixed + size, *v = k + kv_size, *gate = v + kv_size;
        bf16 *up = gate + wide;
        rms_norm(x, b->first_norm, normed, b->epsilon, 1, hidden, threads);
        multiply(&b->q, normed, q, threads);
        multiply(&b->k, normed, k, threads);
        multiply(&b->v, normed, v, threads);
        attend(q, k, v, cos, sin, b->keys, b->values, mixed, b->heads, b->kv_heads, b->dim, b->capacity, used, threads);
        multiply(&b->o, mixed, more, threads);
        add(x, more, hidden);
        rms_norm(x, b->second_norm, normed, b->epsilon, 1, hidden, threads);
        multiply(&b->gate, normed, gate, threads);
        multiply(&b->up, normed, up, threads);
        for (long i = 0; i < wide; i += 16) {
            __m512 one = _mm512_set1_ps(1), g = widen16(gate + i);
            __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
            silu = _mm512_mul_ps(round16(silu), widen16(up + i));
            _mm256_storeu_si256((void *)(gate + i), (__m256i)_mm512_cvtneps_pbh(silu));
        }
        multiply(&b->down, gate, more, threads);
        add(x, more, hidden);
        free(normed);
    }
}

// ---- GPTQ: a few columns that follow on each other (qlib/quantize/gptq.py) ----

void round_columns(float *moved, float *errors, const float *upper, const float *scales, const float *zeros,
                   const int64_t *groups, const uint8_t *kept, long columns, long out, long levels, int threads) {
    enum { LANES = 64 };
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < out; n += LANES) {
        long wide = LEAST(LANES, out - n);
        EACH(j, columns) {
            float now[LANES];
            long at = j * out + n;
            const float *scale = scales + groups[j] * out + n, *zero = zeros + groups[j] * out + n;
            EACH(l, wide) now[l] = moved[at + l];
            EACH(i, j) {
                float factor = upper[i * columns + j];
                EACH(l, wide) now[l] += errors[i * out + n + l] * factor;
            }
            EACH(l, wide) {
                float step = fminf(fmaxf(rintf(now[l] / scale[l]), -zero[l]), levels - 1 - zero[l]);
                step = kept && !kept[at + l] ? 0 : step;
                moved[at + l] = step + zero[l];
                errors[at + l] -= step * scale[l];
            }
        }
    }
}
