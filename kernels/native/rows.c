/* What a decoder layer does to rows between its products: one pass over memory each, a row by one thread. */

#include <math.h>

#include "step.h"

/* Of the functions and of the structs of step.h, attention.h and step.c: native_library.py's VERSION. */
EXPORT int32_t bough_version(void) { return 8; }

/* Fewer elements than this are done by the calling thread: to wake another takes longer. */
#define WORTH_A_THREAD 32768

INLINE float squares(const void *x, ptrdiff_t at, int size, const int is_bf16) {
    vec sum = (vec){};
    for (int i = 0; i < size; i += LANES) {
        const vec part = load(x, at + i, is_bf16);
        sum += part * part;
    }
    return horizontal_sum(sum);
}

INLINE vec rounded(vec x, const int is_bf16) {
    return is_bf16 ? (vec)(high_halves(x) & 0xffff0000) : x;
}

/* x / rms(x), rounded to x's type, times the weight, rounded again: as transformers does. */
INLINE void normalise(const void *x, ptrdiff_t from, const void *weight, void *out, ptrdiff_t to, int size, float eps,
                      const int is_bf16) {
    const float scale = 1.0f / sqrtf(squares(x, from, size, is_bf16) / (float)size + eps);
    for (int i = 0; i < size; i += LANES) {
        const vec scaled = rounded(load(x, from + i, is_bf16) * scale, is_bf16);
        store(out, to + i, scaled * load(weight, i, is_bf16), is_bf16);
    }
}

INLINE void norm_row(void *x, const void *delta, const void *weight, void *out, ptrdiff_t at, int size, float eps,
                     const int is_bf16) {
    if (delta)
        for (int i = 0; i < size; i += LANES)
            store(x, at + i, load(x, at + i, is_bf16) + load(delta, at + i, is_bf16), is_bf16);
    if (out) normalise(x, at, weight, out, at, size, eps, is_bf16);
}

CLONES static void norm_one(void *x, const void *delta, const void *weight, void *out, ptrdiff_t at, int size,
                            float eps, int is_bf16) {
    if (is_bf16)
        norm_row(x, delta, weight, out, at, size, eps, 1);
    else
        norm_row(x, delta, weight, out, at, size, eps, 0);
}

EXPORT void bough_add_rms_norm(void *x, const void *delta, const void *weight, void *out, int32_t num_rows,
                               int32_t size, float eps, int32_t is_bf16) {
#pragma omp parallel for if ((ptrdiff_t)num_rows * size >= WORTH_A_THREAD)
    for (int row = 0; row < num_rows; row++)
        norm_one(x, delta, weight, out, (ptrdiff_t)row * size, size, eps, is_bf16);
}

void bough_norm_alone(void *x, const void *delta, const void *weight, void *out, int32_t num_rows, int32_t size,
                      float eps, int32_t is_bf16) {
    for (int row = 0; row < num_rows; row++)
        norm_one(x, delta, weight, out, (ptrdiff_t)row * size, size, eps, is_bf16);
}

/* Rotate the pairs (i, i + dim / 2) of one head; in float, sums and products rounded one by one in a fixed order. */
INLINE void rotate(const void *in, ptrdiff_t from, const float *cosine, const float *sine, void *out, ptrdiff_t to,
                   int dim, const int is_bf16) {
    float a[256], b[256];
    for (int i = 0; i < dim; i += LANES) {
        vec part = load(in, from + i, is_bf16);
        memcpy(&a[i], &part, sizeof part);
    }
    const int half = dim / 2;
    for (int i = 0; i < half; i++) {
        b[i] = a[i] * cosine[i] - a[i + half] * sine[i];
        b[i + half] = a[i + half] * cosine[i] + a[i] * sine[i];
    }
    for (int i = 0; i < dim; i += LANES) store(out, to + i, load(b, i, 0), is_bf16);
}

/* Store one head as bytes times a scale, its largest magnitude / 127; what is not finite makes the scale NaN. */
INLINE void quantise(const void *in, ptrdiff_t from, int8_t *out, ptrdiff_t to, float *scale, int dim,
                     const int is_bf16) {
    vec largest = (vec){}, strange = (vec){};
    for (int i = 0; i < dim; i += LANES) {
        const vec x = load(in, from + i, is_bf16);
        largest = larger(larger(x, -x), largest);
        strange += x - x;
    }
    *scale = horizontal_max(largest) / 127.0f + horizontal_sum(strange);
    const float divisor = *scale > 0.0f ? *scale : 1.0f;
    for (int i = 0; i < dim; i += LANES) store_bytes(out, to + i, load(in, from + i, is_bf16) / divisor);
}

INLINE void split_row(const Split *s, int row, const int is_bf16, const int is_quantised) {
    const int dim = s->dim, heads = s->num_heads, kv_heads = s->num_kv_heads;
    const ptrdiff_t from = (ptrdiff_t)row * (heads + 2 * kv_heads) * dim, slot = s->slots[row] * kv_heads * dim;
    const float *cosine = s->cosine + (ptrdiff_t)row * (dim / 2), *sine = s->sine + (ptrdiff_t)row * (dim / 2);
    for (int head = s->q ? 0 : heads; head < heads + kv_heads; head++) {
        const int is_key = head >= heads;
        const void *weight = is_key ? s->k_weight : s->q_weight, *in = s->qkv;
        ptrdiff_t at = from + (ptrdiff_t)head * dim;
        float normed[256]; /* as wide as a head of either type may be */
        if (weight) {
            normalise(s->qkv, at, weight, normed, 0, dim, s->eps, is_bf16);
            in = normed;
            at = 0;
        }
        const ptrdiff_t scale = s->slots[row] * kv_heads + (head - heads);
        if (is_key && is_quantised) {
            float turned[256]; /* as wide as a head of either type may be */
            rotate(in, at, cosine, sine, turned, 0, dim, is_bf16);
            quantise(turned, 0, s->k, slot + (ptrdiff_t)(head - heads) * dim, &s->k_scales[scale], dim, is_bf16);
        } else if (is_key)
            rotate(in, at, cosine, sine, s->k, slot + (ptrdiff_t)(head - heads) * dim, dim, is_bf16);
        else
            rotate(in, at, cosine, sine, s->q, ((ptrdiff_t)row * heads + head) * dim, dim, is_bf16);
    }
    const ptrdiff_t values = from + (ptrdiff_t)(heads + kv_heads) * dim;
    if (is_quantised)
        for (int head = 0; head < kv_heads; head++)
            quantise(s->qkv, values + (ptrdiff_t)head * dim, s->v, slot + (ptrdiff_t)head * dim,
                     &s->v_scales[s->slots[row] * kv_heads + head], dim, is_bf16);
    else
        for (int i = 0; i < kv_heads * dim; i += LANES)
            store(s->v, slot + i, load(s->qkv, values + i, is_bf16), is_bf16);
}

CLONES static void split_one(const Split *s, int row) {
    if (s->k_scales && s->is_bf16)
        split_row(s, row, 1, 1);
    else if (s->k_scales)
        split_row(s, row, 0, 1);
    else if (s->is_bf16)
        split_row(s, row, 1, 0);
    else
        split_row(s, row, 0, 0);
}

EXPORT void bough_split_rotate_store(const Split *s) {
#pragma omp parallel for if ((ptrdiff_t)s->num_tokens * (s->num_heads + 2 * s->num_kv_heads) * s->dim >= WORTH_A_THREAD)
    for (int row = 0; row < s->num_tokens; row++) split_one(s, row);
}

void bough_split_alone(const Split *s) {
    for (int row = 0; row < s->num_tokens; row++) split_one(s, row);
}

INLINE void gate_row(const void *gate_up, void *out, int row, int size, const int is_bf16) {
    const ptrdiff_t from = (ptrdiff_t)row * 2 * size, to = (ptrdiff_t)row * size;
    for (int i = 0; i < size; i += LANES) {
        const vec gate = load(gate_up, from + i, is_bf16);
        const ivec is_negative = gate < 0.0f;
        const vec magnitude = (vec)((ivec)gate & 0x7fffffff);
        const vec power = exp_of(-magnitude); /* never above 1 */
        const vec one = splat(1.0f);
        const vec top = (vec)(((ivec)power & is_negative) | ((ivec)one & ~is_negative));
        const vec silu = rounded(gate * top / (1.0f + power), is_bf16);
        store(out, to + i, silu * load(gate_up, from + size + i, is_bf16), is_bf16);
    }
}

CLONES static void gate_one(const void *gate_up, void *out, int row, int size, int is_bf16) {
    if (is_bf16)
        gate_row(gate_up, out, row, size, 1);
    else
        gate_row(gate_up, out, row, size, 0);
}

/* out = silu(gate) * up for gate_up (num_rows, 2 * size), the two side by side; size a multiple of LANES. */
EXPORT void bough_gated_silu(const void *gate_up, void *out, int32_t num_rows, int32_t size, int32_t is_bf16) {
#pragma omp parallel for if ((ptrdiff_t)num_rows * size >= WORTH_A_THREAD)
    for (int row = 0; row < num_rows; row++) gate_one(gate_up, out, row, size, is_bf16);
}
