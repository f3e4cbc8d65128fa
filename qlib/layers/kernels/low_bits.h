// What kernels of one row and codes of 2 or 4 bits share. Blocks of 64 output channels, weight = (code - middle) * scale + zero;
// scales and zeros lie side by side: bf16 [groups, channels, 2].

#pragma once

#include "common.h"

// What brings the bytes of `inputs` input channels, `width` bytes for each, side by side for each of 16 output channels, those
// from 16 * half on. Two input channels only: the odd bytes mean nothing.
INLINE __m512i side_by_side(long half, const int inputs, const int width) {
    uint8_t places[64];
    EACH(i, 64) places[i] = i / 4 + 16 * half + width * (inputs == 4 ? i % 4 : i / 2 % 2);
    return _mm512_loadu_si512(places);
}

// The next group's scales lie far from these: at the end, the first ones of the next block.
INLINE void fetch_scales(const bf16 *scales_zeros, long g, long groups, long n, long channels) {
    const bf16 *next = scales_zeros + (g + 1 < groups ? (g + 1) * channels + n : n + 64) * 2;
    EACH(j, 4) _mm_prefetch((const char *)(next + j * 32), _MM_HINT_T0);
}

// totals [4] of 16 channels each += a group's products. `sums`: with each digit, of codes that are factor[j] too large.
INLINE void add_group(__m512i sums[DIGITS][4], const float *factor, const bf16 *scales_zeros, float middle, float group_sum,
                      __m512 *totals) {
    EACH(j, 4) {
        __m512i both = _mm512_loadu_si512(scales_zeros + j * 32);
        __m512 scale = even_halves(both), rest = _mm512_fnmadd_ps(_mm512_set1_ps(middle), scale, odd_halves(both));
        __m512 sum = _mm512_mul_ps(join_digits(&sums[0][j], 4), _mm512_set1_ps(1 / factor[j]));
        totals[j] = _mm512_fmadd_ps(sum, scale, totals[j]);
        totals[j] = _mm512_fmadd_ps(_mm512_set1_ps(group_sum), rest, totals[j]);
    }
}

INLINE void finish_block(const __m512 *totals, float unit, const bf16 *bias, bf16 *out) {
    EACH(j, 4) {
        float last[16];
        _mm512_storeu_ps(last, totals[j]);
        EACH(i, 16) out[j * 16 + i] = narrow(unit * last[i] + (bias ? widen(bias[j * 16 + i]) : 0));
    }
}

// One row in digits and the sums of its groups, in units of the last digit.
typedef struct {
    int8_t *digits;  // [DIGITS, in]
    float *group_sums, unit;
} row_in_digits;

INLINE row_in_digits split_groups(const bf16 *x, long in, long group) {
    row_in_digits row = {malloc(DIGITS * in), malloc(sizeof(float) * (in / group))};
    row.unit = split_row(x, row.digits, in);
    EACH(g, in / group) row.group_sums[g] = sum_of(x + g * group, group) / row.unit;
    return row;
}

INLINE void free_row(row_in_digits row) {
    free(row.digits);
    free(row.group_sums);
}
