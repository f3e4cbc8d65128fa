// Norms and attention of one token, softmax of many.

#include "common.h"

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
