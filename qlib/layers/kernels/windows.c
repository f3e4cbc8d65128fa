// Causal attention of whole windows of text, forwards and backwards, without ever holding all weights (as in Dao et al. 2022,
// arXiv:2205.14135): heads of 32 k numbers, products of bf16 pairs, sums in fp32.

#include "common.h"

enum { QUERIES = 32, SIDE = 8, LANES = 16, CHUNK = 2 * LANES };  // queries at a time; a tile is SIDE x CHUNK sums

// Where q, k, v and the like lie: numbers between rows, heads and tokens; the numbers of a head lie side by side.
typedef struct {
    long row, head, token;
} strides;

// sums[r] += a[r, t] * b[t, 0 to 31] over `steps` pairs t: a at a[r * a_row + t * a_step], b at b[t * b_step].
INLINE void add_tile(const uint32_t *a, long a_row, long a_step, const uint32_t *b, long b_step, long steps,
                     __m512 sums[SIDE][2]) {
    EACH(t, steps) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(b + t * b_step);
        __m512bh second = (__m512bh)_mm512_loadu_si512(b + t * b_step + LANES);
        EACH(r, SIDE) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + t * a_step]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, first);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, second);
        }
    }
}

// out [rows, columns], whose rows lie `apart`, = or += a . b; rows are a multiple of SIDE, columns of CHUNK.
static void multiply(const uint32_t *a, long a_row, long a_step, const uint32_t *b, long b_step, long steps, float *out,
                     long rows, long columns, long apart, int adds) {
    for (long c = 0; c < columns; c += CHUNK)
        for (long i = 0; i < rows; i += SIDE) {
            __m512 sums[SIDE][2];
            EACH(r, SIDE) EACH(h, 2)
                sums[r][h] = adds ? _mm512_loadu_ps(out + (i + r) * apart + c + h * LANES) : _mm512_setzero_ps();
            add_tile(a + i * a_row, a_row, a_step, b + c, b_step, steps, sums);
            EACH(r, SIDE) EACH(h, 2) _mm512_storeu_ps(out + (i + r) * apart + c + h * LANES, sums[r][h]);
        }
}

// Rows as they are, [rows, width / 2] pairs; what is not there is 0.
static void copy_rows(const bf16 *x, long apart, long there, uint32_t *out, long rows, long width) {
    EACH(i, rows) {
        if (i < there) memcpy(out + i * width / 2, x + i * apart, sizeof(bf16) * width);
        else memset(out + i * width / 2, 0, sizeof(bf16) * width);
    }
}

// Pairs of neighbours in a row, turned: [width / 2, rows].
static void turn(const bf16 *x, long apart, long there, uint32_t *out, long rows, long width) {
    EACH(i, rows) EACH(t, width / 2) {
        uint32_t pair = 0;
        if (i < there) memcpy(&pair, x + i * apart + 2 * t, sizeof(pair));
        out[t * rows + i] = pair;
    }
}

// Pairs of rows: [rows / 2, width].
static void pair_rows(const bf16 *x, long apart, long there, uint32_t *out, long rows, long width) {
    EACH(i, rows / 2) for (long c = 0; c < width; c += LANES) {
        __m512i pair = _mm512_setzero_si512();
        if (2 * i < there) pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + 2 * i * apart + c)));
        if (2 * i + 1 < there) {
            __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + (2 * i + 1) * apart + c)));
            pair = _mm512_or_si512(pair, _mm512_slli_epi32(second, 16));
        }
        _mm512_storeu_si512(out + i * width + c, pair);
    }
}

// e^x for x that is hardly above 0, relative error below 1e-5: the result is rounded to bf16.
INLINE __m512 short_exp(__m512 x) {
    x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87)), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(1.33335581e-3f);
    const float series[] = {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1};  // log(2)^n / n!
    EACH(n, 5) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(series[n]));
    return _mm512_scalef_ps(sum, whole);
}

INLINE __mmask16 seen_of(long seen, long from) {  // which of 16 keys from `from` on are among the first `seen`
    return seen - from >= LANES ? 0xffff : seen <= from ? 0 : (1 << (seen - from)) - 1;
}

static void narrow_rows(const float *from, long width, long rows, bf16 *to, long apart) {
    EACH(i, rows) for (long c = 0; c < width; c += LANES) {
        __m512 some = _mm512_loadu_ps(from + i * width + c);
        _mm256_storeu_si256((void *)(to + i * apart + c), (__m256i)_mm512_cvtneps_pbh(some));
    }
}

// out: [rows, heads, tokens, width] as `o` says. logs: fp32 [rows, heads, tokens], the logarithm of what weights were
// divided by. heads / kv_heads neighbouring heads share keys and values.
void attend_windows(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *logs, const strides *at, float scale,
                    long rows, long heads, long kv_heads, long tokens, long width, int threads) {
    const strides *of_q = at, *of_k = at + 1, *of_v = at + 2, *of_out = at + 3;
    long room = (tokens + QUERIES - 1) / QUERIES * QUERIES, half = width / 2, sharing = heads / kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    EACH(task, rows * kv_heads) {
        long m = task / kv_heads, g = task % kv_heads;
        const bf16 *keys = k + m * of_k->row + g * of_k->head, *values = v + m * of_v->row + g * of_v->head;
        uint32_t *turned = aligned_alloc(64, 4 * (2 * room * half + QUERIES * (half + room / 2)));
        uint32_t *paired = turned + room * half, *some = paired + room * half, *weights = some + QUERIES * half;
        float *scores = aligned_alloc(64, 4 * QUERIES * (room + width)), *mixed = scores + QUERIES * room;
        turn(keys, of_k->token, tokens, turned, room, width);
        pair_rows(values, of_v->token, tokens, paired, room, width);
        for (long h = g * sharing; h < (g + 1) * sharing; h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                long count = LEAST(QUERIES, tokens - first), end = first + QUERIES;
                float factors[QUERIES];
                copy_rows(q + m * of_q->row + h * of_q->head + first * of_q->token, of_q->token, count, some, QUERIES, width);
                multiply(some, half, 1, turned, room, half, scores, QUERIES, end, room, 0);
                EACH(i, QUERIES) {
                    float *row = scores + i * room;
                    bf16 *weight = (bf16 *)weights + i * room;
                    long seen = first + i + 1;
                    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
                    for (long j = 0; j < seen; j += LANES)
                        most = _mm512_mask_max_ps(most, seen_of(seen, j), most, _mm512_loadu_ps(row + j));
                    float top = _mm512_reduce_max_ps(most) * scale;
                    for (long j = 0; j < end; j += LANES) {
                        __m512 one = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), by, _mm512_set1_ps(top));
                        one = _mm512_maskz_mov_ps(seen_of(seen, j), short_exp(one));
                        total = _mm512_add_ps(total, one);
                        _mm256_storeu_si256((void *)(weight + j), (__m256i)_mm512_cvtneps_pbh(one));
                    }
                    float sum = _mm512_reduce_add_ps(total);
                    factors[i] = 1 / sum;
                    if (i < count) logs[(m * heads + h) * tokens + first + i] = top + logf(sum);
                }
                multiply(weights, room / 2, 1, paired, width, end / 2, mixed, QUERIES, width, width, 0);
                EACH(i, count) EACH(c, width) mixed[i * width + c] *= factors[i];
                narrow_rows(mixed, width, count, out + m * of_out->row + h * of_out->head + first * of_out->token, of_out->token);
            }
        free(turned);
        free(scores);
    }
}

// Letters as in the paper: dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q, dV = P^T dO. The paper's rowsum(dO O) is the same
// number, but not where O was rounded to bf16. `at` tells of q, k, v, the gradient of the result, and those of q, k and v.
void attend_windows_backward(const bf16 *q, const bf16 *k, const bf16 *v, const float *logs, const bf16 *gradient,
                             bf16 *to_q, bf16 *to_k, bf16 *to_v, const strides *at, float scale,
                             long rows, long heads, long kv_heads, long tokens, long width, int threads) {
    const strides *of_q = at, *of_k = at + 1, *of_v = at + 2, *of_given = at + 3, *of_dq = at + 4, *of_dk = at + 5;
    const strides *of_dv = at + 6;
    long room = (tokens + QUERIES - 1) / QUERIES * QUERIES, half = width / 2, sharing = heads / kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    EACH(task, rows * kv_heads) {
        long m = task / kv_heads, g = task % kv_heads;
        const bf16 *keys = k + m * of_k->row + g * of_k->head, *values = v + m * of_v->row + g * of_v->head;
        uint32_t *turned_k = aligned_alloc(64, 4 * (3 * room * half + QUERIES * (4 * half + 3 * room / 2)));
        uint32_t *turned_v = turned_k + room * half, *paired_k = turned_v + room * half;
        uint32_t *some_q = paired_k + room * half, *some_o = some_q + QUERIES * half, *pairs_q = some_o + QUERIES * half;
        uint32_t *pairs_o = pairs_q + QUERIES * half, *rows_s = pairs_o + QUERIES * half;
        uint32_t *pairs_s = rows_s + QUERIES * room / 2, *pairs_p = pairs_s + QUERIES * room / 2;
        float *s = aligned_alloc(64, 4 * (QUERIES * (2 * room + width) + 2 * room * width)), *dp = s + QUERIES * room;
        float *dq = dp + QUERIES * room, *dk = dq + QUERIES * width, *dv = dk + room * width;
        memset(dk, 0, 4 * 2 * room * width);
        turn(keys, of_k->token, tokens, turned_k, room, width);
        turn(values, of_v->token, tokens, turned_v, room, width);
        pair_rows(keys, of_k->token, tokens, paired_k, room, width);
        for (long h = g * sharing; h < (g + 1) * sharing; h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                long count = LEAST(QUERIES, tokens - first), end = first + QUERIES;
                const bf16 *queries = q + m * of_q->row + h * of_q->head + first * of_q->token;
                const bf16 *given = gradient + m * of_given->row + h * of_given->head + first * of_given->token;
                copy_rows(queries, of_q->token, count, some_q, QUERIES, width);
                copy_rows(given, of_given->token, count, some_o, QUERIES, width);
                pair_rows(queries, of_q->token, count, pairs_q, QUERIES, width);
                pair_rows(given, of_given->token, count, pairs_o, QUERIES, width);
                multiply(some_q, half, 1, turned_k, room, half, s, QUERIES, end, room, 0);
                multiply(some_o, half, 1, turned_v, room, half, dp, QUERIES, end, room, 0);
                for (long i = 0; i < QUERIES; i += 2) {
                    float share[2];
                    EACH(b, 2) {
                        float *row = s + (i + b) * room, log_of = 0;  // scores become weights
                        if (i + b < count) log_of = logs[(m * heads + h) * tokens + first + i + b];
                        __m512 sum = _mm512_setzero_ps();
                        for (long j = 0; j < end; j += LANES) {
                            __mmask16 there = i + b < count ? seen_of(first + i + b + 1, j) : 0;
                            __m512 p = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(log_of));
                            p = _mm512_maskz_mov_ps(there, short_exp(p));
                            _mm512_storeu_ps(row + j, p);
                            sum = _mm512_fmadd_ps(p, _mm512_loadu_ps(dp + (i + b) * room + j), sum);
                        }
                        share[b] = _mm512_reduce_add_ps(sum);
                    }
                    for (long j = 0; j < end; j += LANES) {
                        __m512i both_p = _mm512_setzero_si512(), both_s = both_p;
                        EACH(b, 2) {
                            __m512 p = _mm512_loadu_ps(s + (i + b) * room + j);
                            __m512 ds = _mm512_sub_ps(_mm512_loadu_ps(dp + (i + b) * room + j), _mm512_set1_ps(share[b]));
                            ds = _mm512_mul_ps(_mm512_mul_ps(ds, p), _mm512_set1_ps(scale));
                            __m256i narrow_s = (__m256i)_mm512_cvtneps_pbh(ds);
                            _mm256_storeu_si256((void *)((bf16 *)rows_s + (i + b) * room + j), narrow_s);
                            __m512i wide_p = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p));
                            __m512i wide_s = _mm512_cvtepu16_epi32(narrow_s);
                            both_p = _mm512_or_si512(both_p, b ? _mm512_slli_epi32(wide_p, 16) : wide_p);
                            both_s = _mm512_or_si512(both_s, b ? _mm512_slli_epi32(wide_s, 16) : wide_s);
                        }
                        _mm512_storeu_si512(pairs_p + i / 2 * room + j, both_p);
                        _mm512_storeu_si512(pairs_s + i / 2 * room + j, both_s);
                    }
                }
                multiply(rows_s, room / 2, 1, paired_k, width, end / 2, dq, QUERIES, width, width, 0);
                narrow_rows(dq, width, count, to_q + m * of_dq->row + h * of_dq->head + first * of_dq->token, of_dq->token);
                multiply(pairs_p, 1, room, pairs_o, width, QUERIES / 2, dv, end, width, width, 1);
                multiply(pairs_s, 1, room, pairs_q, width, QUERIES / 2, dk, end, width, width, 1);
            }
        narrow_rows(dk, width, tokens, to_k + m * of_dk->row + g * of_dk->head, of_dk->token);
        narrow_rows(dv, width, tokens, to_v + m * of_dv->row + g * of_dv->head, of_dv->token);
        free(turned_k);
        free(s);
    }
}
