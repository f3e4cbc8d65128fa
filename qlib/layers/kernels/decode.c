// Decoder blocks for one token: short work, of which Python would make a long one.

#include "common.h"

// A linear that multiplies one row. `kind`: 0 int4_row, 1 int8_rows, 2 int8_dot, 3 int2_rows.
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
    if (l->kind == 3) int2_rows(x, l->codes, l->scales, l->bias, out, 1, l->in, l->group, l->channels, threads);
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
