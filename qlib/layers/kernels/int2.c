#include "low_bits.h"

// ---- int2 (int2.py), weight = (code - 2) * scale + zero ----
// A block is 64 channels, [in, 16] bytes: channels j, j + 16, j + 32 and j + 48 in byte j, the first in its lowest bits.

static const float factor[4] = {1, 4, 16, 64};

// Rows in digits, as in int4.c. With all bits but two masked out, bytes are 1, 4, 16 or 64 times the codes.
void int2_rows(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, const bf16 *bias, bf16 *out, long rows,
               long in, long group, long channels, int threads) {
    long groups = in / group;
    row_in_digits *split = malloc(sizeof(row_in_digits) * rows);
    EACH(m, rows) split[m] = split_groups(x + m * in, in, group);
    const __m512i order = side_by_side(0, 4, 16);
    __m512i mask[4];
    EACH(j, 4) mask[j] = _mm512_set1_epi8((char)(3 << 2 * j));
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < channels; n += 64) {
        const uint8_t *block = packed + n / 4 * in;
        EACH(m, rows) {  // the first row fetches the block, the others find it in the cache
            __m512 totals[4];
            EACH(j, 4) totals[j] = _mm512_setzero_ps();
            EACH(g, groups) {
                if (!m) fetch_scales(scales_zeros, g, groups, n, channels);
                __m512i sums[DIGITS][4];
                EACH(p, DIGITS) EACH(j, 4) sums[p][j] = _mm512_setzero_si512();
                if (GROUP_AT_ONCE && !m)
                    EACH(i, group / 4) _mm_prefetch((const char *)block + g * group * 16 + 64 * i + AHEAD_INT4, WHERE_INT4);
                for (long k = g * group; k < (g + 1) * group; k += 4) {
                    const uint8_t *at = block + k * 16;
                    if (!GROUP_AT_ONCE && !m) _mm_prefetch((const char *)at + AHEAD_INT4, WHERE_INT4);
                    __m512i bytes = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(at)), codes[4];
                    EACH(j, 4) codes[j] = _mm512_and_si512(bytes, mask[j]);
                    EACH(p, DIGITS) {
                        int32_t four;
                        memcpy(&four, split[m].digits + p * in + k, sizeof(four));
                        __m512i digit = _mm512_set1_epi32(four);
                        EACH(j, 4) ADD_PRODUCTS(sums[p][j], codes[j], digit);
                    }
                }
                add_group(sums, factor, scales_zeros + (g * channels + n) * 2, 2, split[m].group_sums[g], totals);
            }
            finish_block(totals, split[m].unit, bias ? bias + n : NULL, out + m * channels + n);
        }
    }
    EACH(m, rows) free_row(split[m]);
    free(split);
}

// Blocks of int2 as blocks of int4 (int4.c), [in, 32] bytes, whose middle code is 8: `count` bytes become twice as many.
void int2_widen(const uint8_t *packed, uint8_t *wide, long count, int threads) {
    const __m128i pair = _mm_set1_epi8(0x33), moved = _mm_set1_epi8(0x66);
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += 16) {
        __m128i four = _mm_loadu_si128((const void *)(packed + i));
        __m128i low = _mm_and_si128(four, pair), high = _mm_and_si128(_mm_srli_epi16(four, 2), pair);
        _mm_storeu_si128((void *)(wide + 2 * i), _mm_add_epi8(low, moved));
        _mm_storeu_si128((void *)(wide + 2 * i + 16), _mm_add_epi8(high, moved));
    }
}
