// What the kernels share: numbers in bf16, one row of activations in exact digits, how memory is fetched ahead.
//
// x is [rows, in], weights are [channels, in], results are bf16 [rows, channels]; `threads` share the channels.
// A null pointer stands for no offsets, or no bias. What sizes each function takes: see native.py.

#pragma once

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

typedef uint16_t bf16;

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

INLINE __m512 exp16(__m512 x) {  // 2^whole * e^rest, relative error below 3e-7
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88)), _mm512_set1_ps(-88));
    __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x), sum = _mm512_set1_ps(1);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);  // log 2 in two parts
    for (int n = 7; n; n--) sum = _mm512_fmadd_ps(_mm512_mul_ps(rest, _mm512_set1_ps(1.f / n)), sum, _mm512_set1_ps(1));
    return _mm512_scalef_ps(sum, whole);
}

// How weights are fetched before they are needed. Measured: Intel's processors with AMX fetch twice as fast into the
// second-level cache, AMD's faster past it. Kernels of few bits compute longer for each byte and need less of a lead.
#ifdef __AMX_TILE__
enum { AHEAD = 16384, WHERE = _MM_HINT_T1, WHERE_INT4 = _MM_HINT_T1, GROUP_AT_ONCE = 1 };
#else
enum { AHEAD = 4096, WHERE = _MM_HINT_NTA, WHERE_INT4 = _MM_HINT_T0, GROUP_AT_ONCE = 0 };
#endif
enum { AHEAD_INT4 = 4096 };

// Products of unsigned and signed bytes. By hand, because gcc spills the sums when it uses _mm512_dpbusd_epi32.
#define ADD_PRODUCTS(sum, plus, any) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(plus), "v"(any))

// One row is fixed-point numbers of 24 bits, as fine as sums in fp32 are: three int8 digits, multiplied exactly.
// Groups of few channels are not worth the trouble; longer ones than these could overflow.
enum { DIGITS = 3, BITS = 22, LONGEST = 65536, LEAST_GROUP = 512 };

// x = (digit 0 + 256 * digit 1 + 65536 * digit 2) * the unit that is returned; digits is [DIGITS, in].
static inline float split_row(const bf16 *x, int8_t *digits, long in) {
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

INLINE __m512 join_digits(const __m512i *sums, long apart) {  // sums of products with each digit, `apart` vectors from the next
    __m512 sum = _mm512_setzero_ps();
    for (long p = DIGITS - 1; p >= 0; p--)
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sums[p * apart]));
    return sum;
}

// ---- kernels that others call ----

void quantize_rows(const bf16 *x, int8_t *codes, float *scales, int32_t *sums, long rows, long in, int threads);
void int8_dot(const int8_t *x, const float *row_scales, const int32_t *row_sums, const int8_t *w, const bf16 *scales,
              const bf16 *bias, bf16 *out, long rows, long in, long channels, int threads);
void int8_rows(const bf16 *x, const int8_t *w, const bf16 *scales, const float *offsets, const bf16 *bias, bf16 *out,
               long rows, long in, long group, long channels, int threads);
void int4_row(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, const bf16 *bias, bf16 *out, long in,
              long group, long channels, int threads);
void int2_rows(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, const bf16 *bias, bf16 *out, long rows,
               long in, long group, long channels, int threads);
void int2_widen(const uint8_t *packed, uint8_t *wide, long count, int threads);
void int4_expand(const uint8_t *packed, const bf16 *scales_zeros, bf16 *out, long in, long group, long channels,
                 long first, long blocks, long start, long depth, long wide, int threads);
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, float epsilon, long rows, long width, int threads);
void attend(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *cos, const bf16 *sin, bf16 *keys, bf16 *values,
            bf16 *out, long heads, long kv_heads, long dim, long capacity, long used, int threads);
