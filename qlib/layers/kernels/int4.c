#include "low_bits.h"

// ---- int4 as torch's CPU kernel keeps it (int4_blocks.py), weight = (code - 8) * scale + zero ----
// A block is 64 channels, [in, 32] bytes: channel j in the low half of byte j, channel j + 32 in the high half.

static const float factor[4] = {1, 1, 16, 16};

// One row, in digits. vpdpbusd takes four input channels of 16 output channels: whole bytes, and bytes without their low
// halves, which are 16 times the codes in the high ones; what the low ones make is the difference. The zeros, and the 8,
// are multiplied with the activations' sum over a group.
void int4_row(const bf16 *x, const uint8_t *packed, const bf16 *scales_zeros, const bf16 *bias, bf16 *out, long in,
              long group, long channels, int threads) {
    long groups = in / group;
    const row_in_digits row = split_groups(x, in, group);
    const __m512i high = _mm512_set1_epi8((char)0xf0), order[2] = {side_by_side(0, 4, 32), side_by_side(1, 4, 32)};
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < channels; n += 64) {
        const uint8_t *block = packed + n / 2 * in;
        __m512 totals[4];
        EACH(j, 4) totals[j] = _mm512_setzero_ps();
        EACH(g, groups) {
            fetch_scales(scales_zeros, g, groups, n, channels);
            __m512i sums[DIGITS][4];
            EACH(p, DIGITS) EACH(j, 4) sums[p][j] = _mm512_setzero_si512();
            if (GROUP_AT_ONCE)
                EACH(i, group / 2) _mm_prefetch((const char *)block + g * group * 32 + 64 * i + AHEAD_INT4, WHERE_INT4);
            for (long k = g * group; k < (g + 1) * group; k += 4) {
                const uint8_t *at = block + k * 32;
                if (!GROUP_AT_ONCE) EACH(i, 2) _mm_prefetch((const char *)at + 64 * i + AHEAD_INT4, WHERE_INT4);
                __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64), bytes[4];
                EACH(half, 2) {
                    bytes[half] = _mm512_permutex2var_epi8(first, order[half], second);
                    bytes[half + 2] = _mm512_and_si512(bytes[half], high);
                }
                EACH(p, DIGITS) {
                    int32_t four;
                    memcpy(&four, row.digits + p * in + k, sizeof(four));
                    __m512i digit = _mm512_set1_epi32(four);
                    EACH(j, 4) ADD_PRODUCTS(sums[p][j], bytes[j], digit);
                }
            }
            EACH(p, DIGITS) EACH(half, 2) sums[p][half] = _mm512_sub_epi32(sums[p][half], sums[p][half + 2]);
            add_group(sums, factor, scales_zeros + (g * channels + n) * 2, 8, row.group_sums[g], totals);
        }
        finish_block(totals, row.unit, bias ? bias + n : NULL, out + n);
    }
    free_row(row);
}

// The weights of `depth` input channels from `start` on, whole groups, of `blocks` blocks from channel `first` on, rounded
// to bf16, in the order of oneDNN's own kernels, which take `wide` channels (32 or 64) at once: out
// [blocks * 64 / wide, depth / 2, wide, 2].
void int4_expand(const uint8_t *packed, const bf16 *scales_zeros, bf16 *out, long in, long group, long channels,
                 long first, long blocks, long start, long depth, long wide, int threads) {
    uint16_t places[32];
    EACH(i, 32) places[i] = i / 2 + i % 2 * 16;
    const __m512i zip = _mm512_loadu_si512(places), order[2] = {side_by_side(0, 2, 32), side_by_side(1, 2, 32)};
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
