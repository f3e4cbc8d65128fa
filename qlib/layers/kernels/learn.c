// Norms and gated units that are differentiated: each read once and written once, forwards and backwards.

#include "common.h"

INLINE void store16(bf16 *to, __m512 x) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

// What rms_norm's result y = weight * (x * r), r = 1 / sqrt(mean(x^2) + epsilon), hands on to x:
// r * (g - (x r) * mean(g (x r))), g = weight * gradient.
void rms_norm_backward(const bf16 *x, const bf16 *weight, const bf16 *gradient, bf16 *out, float epsilon, long rows,
                       long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++) {
        const bf16 *row = x + m * width, *given = gradient + m * width;
        __m512 squares = _mm512_setzero_ps(), products = _mm512_setzero_ps();
        for (long k = 0; k < width; k += 16) {
            __m512 value = widen16(row + k), g = _mm512_mul_ps(widen16(weight + k), widen16(given + k));
            squares = _mm512_fmadd_ps(value, value, squares);
            products = _mm512_fmadd_ps(value, g, products);
        }
        float factor = 1 / sqrtf(_mm512_reduce_add_ps(squares) / width + epsilon);
        float share = _mm512_reduce_add_ps(products) / width * factor * factor;
        for (long k = 0; k < width; k += 16) {
            __m512 g = _mm512_mul_ps(widen16(weight + k), widen16(given + k));
            g = _mm512_fnmadd_ps(widen16(row + k), _mm512_set1_ps(share), g);
            store16(out + m * width + k, _mm512_mul_ps(g, _mm512_set1_ps(factor)));
        }
    }
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// gate * sigmoid(gate), rounded as torch rounds it, * up
void gated(const bf16 *gate, const bf16 *up, bf16 *out, long count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long k = 0; k < count; k += 16) {
        __m512 g = widen16(gate + k);
        store16(out + k, _mm512_mul_ps(round16(_mm512_mul_ps(g, sigmoid(g))), widen16(up + k)));
    }
}

void gated_backward(const bf16 *gate, const bf16 *up, const bf16 *gradient, bf16 *to_gate, bf16 *to_up, long count,
                    int threads) {
#pragma omp parallel for num_threads(threads)
    for (long k = 0; k < count; k += 16) {
        __m512 g = widen16(gate + k), d = widen16(gradient + k), s = sigmoid(g), one = _mm512_set1_ps(1);
        __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
        store16(to_up + k, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
        store16(to_gate + k, _mm512_mul_ps(_mm512_mul_ps(d, widen16(up + k)), slope));
    }
}
