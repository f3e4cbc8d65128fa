#include "common.h"

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
