/* The same attention by dot products of two bfloat16 at a time (AVX512_BF16): twice the work an instruction.
 *
 * A score is a sum over pairs of channels, a weighted value one over pairs of keys, each in order by one instruction:
 * a row's bits depend on its position and its tokens only, as in attention.c. Scores, their exponentials and what is
 * folded are float; weights are rounded to bfloat16, and their sum is that of the rounded, so that they add up to 1.
 */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2")

#include "attention.h"
#include "nearly.h"

int bough_has_pairs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
}

/* A chunk's keys by pair of channels, its values by pair of keys: words of two bfloat16, the first in the low half. */
typedef struct {
    uint32_t keys[MAX_DIM / 2 * CHUNK] __attribute__((aligned(64)));   /* (dim / 2, CHUNK) */
    uint32_t values[CHUNK / 2 * MAX_DIM] __attribute__((aligned(64))); /* (CHUNK / 2, dim) */
} Tile;

/* Up to ROW_TILE queries of one head group are computed at a time: 24 sums, where there are 32 registers. */
#define ROW_TILE 6
#define MOST_VECS 8

typedef struct {
    uint16_t q[ROW_TILE * MAX_DIM] __attribute__((aligned(64)));
    float scores[ROW_TILE * CHUNK] __attribute__((aligned(64)));
    uint16_t weights[ROW_TILE * CHUNK] __attribute__((aligned(64)));
    float means[ROW_TILE * MAX_DIM] __attribute__((aligned(64)));
} Rows;

/* 2 * LANES channels of a block's keys: lane i of the word into[c * CHUNK] is channels 2 c and 2 c + 1 of key i. */
INLINE void turn_pairs(uint32_t *into, const uint16_t *const at[LANES], int d, int valid) {
    vec m[LANES];
    for (int i = 0; i < LANES; i++) m[i] = i < valid ? (vec) * (const vec_u *)(at[i] + d) : (vec){};
    transpose(m);
    for (int i = 0; i < LANES; i++) *(vec *)&into[i * CHUNK] = m[i];
}

/* The words of two keys' values. */
INLINE void pair(uint32_t *into, const uint16_t *first, const uint16_t *second, int dim) {
    for (int d = 0; d < dim; d += LANES) {
        const uvec low = first ? __builtin_convertvector(*(const half_u *)(first + d), uvec) : (uvec){};
        const uvec high = second ? __builtin_convertvector(*(const half_u *)(second + d), uvec) : (uvec){};
        *(uvec *)&into[d] = high << 16 | low;
    }
}

INLINE void read_tile(Tile *tile, const Args *args, const Span *span, int first, int count, const int kind) {
    const int dim = args->dim;
    Place here = place_of(args, span->pages, first);
    for (int begin = 0; begin < count; begin += LANES) {
        const int valid = count - begin < LANES ? count - begin : LANES;
        ask_ahead(args, span, first + begin, kind);
        const uint16_t *k[LANES], *v[LANES];
        for (int i = 0; i < LANES; i++) {
            const ptrdiff_t at = i < valid ? (next_slot(args, &here) * args->num_kv_heads + span->head) * dim : -1;
            k[i] = i < valid ? (const uint16_t *)args->k + at : NULL;
            v[i] = i < valid ? (const uint16_t *)args->v + at : NULL;
        }
        for (int d = 0; d < dim; d += 2 * LANES) turn_pairs(&tile->keys[d / 2 * CHUNK + begin], k, d, valid);
        for (int i = 0; i < LANES; i += 2) pair(&tile->values[(begin + i) / 2 * dim], v[i], v[i + 1], dim);
    }
}

INLINE __m512bh word_of(const uint16_t *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    return (__m512bh)_mm512_set1_epi32(word);
}

/* out[r][j] = scale * the sum over t < 2 * steps of a[r][t] * b[t][j], two at a time in the order of t. */
INLINE void product(const uint16_t *a, int a_stride, const uint32_t *b, int b_stride, float *out, int out_stride,
                    int steps, float scale, const int rows, const int vecs) {
    __m512 sums[ROW_TILE][MOST_VECS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) sums[r][j] = _mm512_setzero_ps();
    for (int t = 0; t < steps; t++) {
        __m512bh right[MOST_VECS];
        for (int j = 0; j < vecs; j++) right[j] = (__m512bh)_mm512_load_si512(&b[t * b_stride + j * LANES]);
        for (int r = 0; r < rows; r++) {
            const __m512bh left = word_of(&a[r * a_stride + 2 * t]);
            for (int j = 0; j < vecs; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) *(vec *)&out[r * out_stride + j * LANES] = (vec)sums[r][j] * scale;
}

INLINE void product_of_rows(const uint16_t *a, int a_stride, const uint32_t *b, int b_stride, float *out,
                            int out_stride, int steps, float scale, const int rows, int vecs) {
    int j = 0;
    for (; rows <= 2 && j + 8 <= vecs; j += 8) /* enough sums to hide how long one takes */
        product(a, a_stride, b + j * LANES, b_stride, out + j * LANES, out_stride, steps, scale, rows, 8);
    for (; j + 4 <= vecs; j += 4)
        product(a, a_stride, b + j * LANES, b_stride, out + j * LANES, out_stride, steps, scale, rows, 4);
    for (; j + 2 <= vecs; j += 2)
        product(a, a_stride, b + j * LANES, b_stride, out + j * LANES, out_stride, steps, scale, rows, 2);
    for (; j < vecs; j++)
        product(a, a_stride, b + j * LANES, b_stride, out + j * LANES, out_stride, steps, scale, rows, 1);
}

INLINE void multiply(const uint16_t *a, int a_stride, const uint32_t *b, int b_stride, float *out, int out_stride,
                     int steps, float scale, int rows, int vecs) {
    switch (rows) {
        case 1: product_of_rows(a, a_stride, b, b_stride, out, out_stride, steps, scale, 1, vecs); break;
        case 2: product_of_rows(a, a_stride, b, b_stride, out, out_stride, steps, scale, 2, vecs); break;
        case 3: product_of_rows(a, a_stride, b, b_stride, out, out_stride, steps, scale, 3, vecs); break;
        case 4: product_of_rows(a, a_stride, b, b_stride, out, out_stride, steps, scale, 4, vecs); break;
        case 5: product_of_rows(a, a_stride, b, b_stride, out, out_stride, steps, scale, 5, vecs); break;
        default: product_of_rows(a, a_stride, b, b_stride, out, out_stride, steps, scale, 6, vecs);
    }
}

INLINE void load_query(Rows *rows, int r, const Args *args, ptrdiff_t at, const int is_bf16) {
    (void)is_bf16; /* always */
    for (int d = 0; d < args->dim; d += LANES)
        *(half_u *)&rows->q[r * MAX_DIM + d] = *(const half_u *)((const uint16_t *)args->q + at + d);
}

/* Not inlined: their sums then have the registers to themselves, and what is known of the strides is constant. */
#define APART static __attribute__((noinline))

APART void multiply_queries(Rows *rows, const uint32_t *keys, int steps, float scale, int num_rows, int vecs) {
    multiply(rows->q, MAX_DIM, keys, CHUNK, rows->scores, CHUNK, steps, scale, num_rows, vecs);
}

APART void multiply_weights(Rows *rows, const uint32_t *values, int dim, int steps, int num_rows) {
    multiply(rows->weights, CHUNK, values, dim, rows->means, dim, steps, 1.0f, num_rows, dim / LANES);
}

INLINE void attend(Rows *rows, const Tile *tile, const Args *args, int count, int num_rows) {
    const int dim = args->dim, vecs = (count + LANES - 1) / LANES;
    multiply_queries(rows, tile->keys, dim / 2, args->scale, num_rows, vecs);
}

INLINE void gather(Rows *rows, const Tile *tile, const Args *args, int count, int num_rows) {
    multiply_weights(rows, tile->values, args->dim, (count + 1) / 2, num_rows);
}

/* Turn the first `valid` scores into weights, the others up to `count` into 0; return the largest score and the sum. */
INLINE void weigh(Rows *rows, int r, int valid, int count, float *largest, float *sum) {
    float *scores = &rows->scores[r * CHUNK];
    const int blocks = (count + LANES - 1) / LANES;
    for (int i = valid; i < blocks * LANES; i++) scores[i] = -__builtin_inff();
    __m512 top = _mm512_load_ps(scores);
    for (int b = 1; b < blocks; b++) top = _mm512_max_ps(top, _mm512_load_ps(&scores[b * LANES]));
    const float m = _mm512_reduce_max_ps(top);
    vec total = (vec){};
    for (int b = 0; b < blocks; b++) {
        const __m256i weights = (__m256i)_mm512_cvtneps_pbh(exp_nearly(_mm512_sub_ps(_mm512_load_ps(&scores[b * LANES]), _mm512_set1_ps(m))));
        _mm256_store_si256((__m256i *)&rows->weights[r * CHUNK + b * LANES], weights);
        total += (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(weights), 16);
    }
    *largest = m;
    *sum = _mm512_reduce_add_ps((__m512)total);
}

#include "attention_unit.h"

void bough_run_pairs(const Args *args, const int32_t *unit, int head, int end_head) {
    run_unit_as(args, unit, head, end_head, 1, KV_BF16);
}

#else

#include "attention.h"

int bough_has_pairs(void) { return 0; }

void bough_run_pairs(const Args *args, const int32_t *unit, int head, int end_head) {
    (void)args, (void)unit, (void)head, (void)end_head;
}

#endif
