/* What a step's operations take, and the functions that carry them out: called from Python, or by step.c. */

#pragma once

#include "attention.h"

/* linear.c. What `bough_linear_kinds` tells, by bits, and what a layer says it is. */
enum { LINEAR_BF16 = 1, LINEAR_BYTES = 2 };

/* Outputs of a panel of weights; rows that pass over it together. */
#define LINEAR_PANEL 64
#define LINEAR_TILE 6

typedef struct {
    const void *x;         /* (num_rows, in_size) */
    const void *weight;    /* panels of it, the last one filled up */
    const float *bias;     /* (out_size filled up to whole panels,) or none */
    const float *scales;   /* of bytes: of each output, like bias */
    const int32_t *offset; /* of bytes: 128 times the sum of each output's weights, like bias */
    uint8_t *units;        /* of bytes: (num_rows, in_size), room for x as bytes, 128 more than the number */
    float *row_scales;     /* of bytes: (num_rows,), room */
    void *out;             /* (num_rows, out_size) */
    int32_t num_rows, in_size, out_size, kind;
    int32_t is_bf16;     /* of x and out */
    int32_t is_gated;    /* of bfloat16: a panel's first half are gates of its second; out is (num_rows, out_size / 2) */
    int32_t num_skipped; /* first panels whose outputs are left as they are */
} Layer;

/* rows.c. */
typedef struct {
    const void *qkv;         /* (num_tokens, num_heads + 2 * num_kv_heads, dim) */
    const void *q_weight;    /* (dim,) of the norm of each query head, or none */
    const void *k_weight;
    const float *cosine;     /* (num_tokens, dim / 2) */
    const float *sine;
    const int64_t *slots;    /* (num_tokens,) */
    void *q;                 /* (num_tokens, num_heads, dim); none: queries are left out */
    void *k;                 /* (num_slots, num_kv_heads, dim), like q or bytes */
    void *v;
    float *k_scales;         /* (num_slots, num_kv_heads) where keys and values are bytes, else none */
    float *v_scales;
    int32_t num_tokens, num_heads, num_kv_heads, dim, is_bf16;
    float eps;
} Split;

EXPORT void bough_attention(const Args *args);

/* out = x weight^T + bias, or silu(gate) * up of that. The caller has checked every argument. */
EXPORT void bough_linear(const Layer *l);

/* The same by the calling thread alone; for weights in bfloat16. */
void bough_linear_alone(const Layer *l) HIDDEN;

/* Part qkv, normalise heads, rotate queries and keys, write keys and values into their slots. */
EXPORT void bough_split_rotate_store(const Split *s);
void bough_split_alone(const Split *s) HIDDEN;

/* x += delta (if there is one), out = x / rms(x) * weight (if there is out). x, delta, out: (num_rows, size), size a
 * multiple of LANES. */
EXPORT void bough_add_rms_norm(void *x, const void *delta, const void *weight, void *out, int32_t num_rows,
                               int32_t size, float eps, int32_t is_bf16);
void bough_norm_alone(void *x, const void *delta, const void *weight, void *out, int32_t num_rows, int32_t size,
                      float eps, int32_t is_bf16) HIDDEN;

EXPORT void bough_gated_silu(const void *gate_up, void *out, int32_t num_rows, int32_t size, int32_t is_bf16);
