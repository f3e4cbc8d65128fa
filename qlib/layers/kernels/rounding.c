// Rounding to nearest and packing, as grid.py, int4_blocks.py and storage.py say what they do: the same bits, in one pass.

#include "common.h"

// Numbers of groups that need no whole vector.
INLINE __mmask16 there_of(long left) { return left < 16 ? (1 << left) - 1 : 0xffff; }

// Least and greatest weight of each group, and 0 if that lies outside of them: w [groups, size], low and high [groups]. Both are
// no number where a weight is none.
void group_ranges(const bf16 *w, float *low, float *high, long groups, long size, int threads) {
#pragma omp parallel for num_threads(threads)
    EACH(g, groups) {
        __m512 least = _mm512_setzero_ps(), most = least;
        __mmask16 none = 0;
        for (long k = 0; k < size; k += 16) {
            __m512 some = widen_some(there_of(size - k), w + g * size + k);
            none |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
            least = _mm512_min_ps(least, some), most = _mm512_max_ps(most, some);
        }
        low[g] = none ? NAN : _mm512_reduce_min_ps(least), high[g] = none ? NAN : _mm512_reduce_max_ps(most);
    }
}

// Codes of integers: w [groups, size], each group's scale and zero. A zero that is no code of its own is added before rounding.
void group_codes(const bf16 *w, const float *scales, const float *zeros, uint8_t *codes, long groups, long size, long levels,
                 long real_zero, int threads) {
#pragma omp parallel for num_threads(threads)
    EACH(g, groups) {
        const __m512 scale = _mm512_set1_ps(scales[g]), zero = _mm512_set1_ps(zeros[g]), top = _mm512_set1_ps(levels - 1);
        for (long k = 0; k < size; k += 16) {
            __mmask16 there = there_of(size - k);
            __m512 steps = _mm512_div_ps(widen_some(there, w + g * size + k), scale);
            if (real_zero) steps = _mm512_roundscale_ps(_mm512_add_ps(steps, zero), 0);
            else steps = _mm512_add_ps(_mm512_roundscale_ps(steps, 0), zero);
            steps = _mm512_min_ps(_mm512_max_ps(steps, _mm512_setzero_ps()), top);
            _mm512_mask_cvtepi32_storeu_epi8(codes + g * size + k, there, _mm512_cvtps_epi32(steps));
        }
    }
}

// Two codes to a byte, the first in the low half: `count` bytes; and back.
void join_pairs(const uint8_t *codes, uint8_t *packed, long count, int threads) {
#pragma omp parallel for simd num_threads(threads)
    EACH(i, count) packed[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

void split_pairs(const uint8_t *packed, uint8_t *codes, long count, int threads) {
#pragma omp parallel for simd num_threads(threads)
    EACH(i, count) codes[2 * i] = packed[i] & 15, codes[2 * i + 1] = packed[i] >> 4;
}

// 32 vectors as one row of 2048 bytes, whose halves are interleaved `times` times, byte by byte: the bits of a byte's place are
// rotated. Five times turn [32, 64] into [64, 32], six times turn it back.
INLINE void interleave(__m512i *rows, const int times) {
    uint8_t places[2][64];
    EACH(i, 64) places[0][i] = i / 2 + i % 2 * 64, places[1][i] = 32 + i / 2 + i % 2 * 64;
    const __m512i first = _mm512_loadu_si512(places[0]), second = _mm512_loadu_si512(places[1]);
    EACH(t, times) {
        __m512i out[32];
        EACH(i, 16) {
            out[2 * i] = _mm512_permutex2var_epi8(rows[i], first, rows[16 + i]);
            out[2 * i + 1] = _mm512_permutex2var_epi8(rows[i], second, rows[16 + i]);
        }
        EACH(i, 32) rows[i] = out[i];
    }
}

// Codes [channels, in] to blocks of int4 (int4_blocks.py), and back; channels are a multiple of 64.
void join_blocks(const uint8_t *codes, uint8_t *packed, long channels, long in, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < channels; n += 64)
        for (long start = 0; start < in; start += 64) {
            const uint8_t *low = codes + n * in + start, *high = low + 32 * in;
            __mmask64 there = in - start < 64 ? (1ull << (in - start)) - 1 : ~0ull;
            __m512i rows[32];
            EACH(j, 32) {
                __m512i up = _mm512_slli_epi16(_mm512_maskz_loadu_epi8(there, high + j * in), 4);
                rows[j] = _mm512_or_si512(_mm512_maskz_loadu_epi8(there, low + j * in), up);
            }
            interleave(rows, 5);
            uint8_t *to = packed + n / 2 * in + start * 32;
            EACH(i, LEAST(64, in - start) / 2) _mm512_storeu_si512(to + 64 * i, rows[i]);
        }
}

void split_blocks(const uint8_t *packed, uint8_t *codes, long channels, long in, int threads) {
    const __m512i half = _mm512_set1_epi8(15);
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < channels; n += 64)
        for (long start = 0; start < in; start += 64) {
            uint8_t *low = codes + n * in + start, *high = low + 32 * in;
            __mmask64 there = in - start < 64 ? (1ull << (in - start)) - 1 : ~0ull;
            const uint8_t *from = packed + n / 2 * in + start * 32;
            __m512i rows[32];
            EACH(i, 32) rows[i] = i < (in - start) / 2 ? _mm512_loadu_si512(from + 64 * i) : _mm512_setzero_si512();
            interleave(rows, 6);
            EACH(j, 32) {
                _mm512_mask_storeu_epi8(low + j * in, there, _mm512_and_si512(rows[j], half));
                _mm512_mask_storeu_epi8(high + j * in, there, _mm512_and_si512(_mm512_srli_epi16(rows[j], 4), half));
            }
        }
}
