/* The same attention by dot products of two bfloat16 at a time (AVX512_BF16): twice the work an instruction.
 *
 * A score is a sum over pairs of channels, a weighted value one over pairs of keys, each in order by one instruction:
 * a row's bits depend on its position and its tokens only, as in attention.c. Scores, their exponentials and what is
 * folded are float; weights are rounded to bfloat16, and their sum is that of the rounded, so that they add up to 1. A
 * chunk's weights are relative to the largest score so far, and its sums go on from those of the chunks before.
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
    float scores[ROW_TILE * CHUNK] __attribute__((aligned(64)));
    uint16_t weights[ROW_TILE * CHUNK] __attribute__((aligned(64)));
    float hidden[MAX_DIM] __attribute__((aligned(64))); /* where rows that have no part in a chunk leave their sums */
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

/* Queries of a tile, and where the weighted values of each are, so far: these times `before`. */
typedef struct {
    const uint16_t *q[ROW_TILE];
    float *acc[ROW_TILE];
    float before[ROW_TILE];
    int is_first; /* nothing is there so far */
} States;

/* LANES * vecs scores of some rows: sums over pairs of channels, in order. */
INLINE void score(const States *of, const uint32_t *keys, float *scores, int steps, const int rows, const int vecs) {
    __m512 sums[ROW_TILE][MOST_VECS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) sums[r][j] = _mm512_setzero_ps();
    for (int t = 0; t < steps; t++) {
        __m512bh right[MOST_VECS];
        for (int j = 0; j < vecs; j++) right[j] = (__m512bh)_mm512_load_si512(&keys[t * CHUNK + j * LANES]);
        for (int r = 0; r < rows; r++) {
            const __m512bh left = word_of(&of->q[r][2 * t]);
            for (int j = 0; j < vecs; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) _mm512_store_ps(&scores[r * CHUNK + j * LANES], sums[r][j]);
}

/* LANES * vecs channels, from `at` on, of the weighted values of some rows: sums over pairs of keys, in order. */
INLINE void sum_up(const States *of, const uint16_t *weights, const uint32_t *values, int dim, int at, int steps,
                   const int rows, const int vecs) {
    __m512 sums[ROW_TILE][MOST_VECS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++)
            sums[r][j] = of->is_first ? _mm512_setzero_ps()
                                      : _mm512_mul_ps(_mm512_loadu_ps(&of->acc[r][at + j * LANES]), _mm512_set1_ps(of->before[r]));
    for (int t = 0; t < steps; t++) {
        __m512bh right[MOST_VECS];
        for (int j = 0; j < vecs; j++) right[j] = (__m512bh)_mm512_load_si512(&values[t * dim + at + j * LANES]);
        for (int r = 0; r < rows; r++) {
            const __m512bh left = word_of(&weights[r * CHUNK + 2 * t]);
            for (int j = 0; j < vecs; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) _mm512_storeu_ps(&of->acc[r][at + j * LANES], sums[r][j]);
}

/* Few rows take more vectors at a time: enough sums to hide how long one takes. */
INLINE void score_rows(const States *of, const uint32_t *keys, float *scores, int steps, int vecs, const int rows) {
    int j = 0;
    for (; rows <= 2 && j + 8 <= vecs; j += 8) score(of, keys + j * LANES, scores + j * LANES, steps, rows, 8);
    for (; j + 4 <= vecs; j += 4) score(of, keys + j * LANES, scores + j * LANES, steps, rows, 4);
    for (; j + 2 <= vecs; j += 2) score(of, keys + j * LANES, scores + j * LANES, steps, rows, 2);
    for (; j < vecs; j++) score(of, keys + j * LANES, scores + j * LANES, steps, rows, 1);
}

INLINE void sum_up_rows(const States *of, const uint16_t *weights, const uint32_t *values, int dim, int steps,
                        const int rows) {
    int at = 0;
    for (; rows <= 2 && at + 8 * LANES <= dim; at += 8 * LANES) sum_up(of, weights, values, dim, at, steps, rows, 8);
    for (; at + 4 * LANES <= dim; at += 4 * LANES) sum_up(of, weights, values, dim, at, steps, rows, 4);
    for (; at < dim; at += 2 * LANES) sum_up(of, weights, values, dim, at, steps, rows, 2);
}

/* Not inlined: their sums then have the registers to themselves, and what is known of the strides is constant. */
#define APART static __attribute__((noinline))

APART void multiply_queries(const States *of, const uint32_t *keys, float *scores, int steps, int rows, int vecs) {
    switch (rows) {
        case 1: score_rows(of, keys, scores, steps, vecs, 1); break;
        case 2: score_rows(of, keys, scores, steps, vecs, 2); break;
        case 3: score_rows(of, keys, scores, steps, vecs, 3); break;
        case 4: score_rows(of, keys, scores, steps, vecs, 4); break;
        case 5: score_rows(of, keys, scores, steps, vecs, 5); break;
        default: score_rows(of, keys, scores, steps, vecs, 6);
    }
}

APART void multiply_weights(const States *of, const uint16_t *weights, const uint32_t *values, int dim, int steps,
                            int rows) {
    switch (rows) {
        case 1: sum_up_rows(of, weights, values, dim, steps, 1); break;
        case 2: sum_up_rows(of, weights, values, dim, steps, 2); break;
        case 3: sum_up_rows(of, weights, values, dim, steps, 3); break;
        case 4: sum_up_rows(of, weights, values, dim, steps, 4); break;
        case 5: sum_up_rows(of, weights, values, dim, steps, 5); break;
        default: sum_up_rows(of, weights, values, dim, steps, 6);
    }
}

/* Let the scores from `valid` to `end`, a multiple of LANES, weigh nothing. */
INLINE void hide(float *scores, int valid, int end) {
    const int block = valid / LANES * LANES;
    const __m512 none = _mm512_set1_ps(-__builtin_inff());
    if (block < end)
        _mm512_store_ps(&scores[block], _mm512_mask_mov_ps(none, (__mmask16)((1u << (valid - block)) - 1), _mm512_load_ps(&scores[block])));
    for (int i = block + LANES; i < end; i += LANES) _mm512_store_ps(&scores[i], none);
}

INLINE float largest_of(const float *scores, int blocks) {
    __m512 top = _mm512_load_ps(scores), other = _mm512_load_ps(&scores[LANES]);
    for (int b = 2; b < blocks; b += 2) {
        top = _mm512_max_ps(top, _mm512_load_ps(&scores[b * LANES]));
        other = _mm512_max_ps(other, _mm512_load_ps(&scores[(b + 1) * LANES]));
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(top, other));
}

/* Turn an even number of blocks of scores into weights 2^(factor (score - top)); return the sum of what they are rounded to. */
INLINE float weigh(const float *scores, uint16_t *weights, int blocks, float factor, float top) {
    const __m512 times = _mm512_set1_ps(factor), less = _mm512_set1_ps(factor * top);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 total = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b += 2) {
        const __m512 low = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(&scores[b * LANES]), times, less));
        const __m512 high = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(&scores[(b + 1) * LANES]), times, less));
        const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
        _mm512_store_si512(&weights[b * LANES], (__m512i)both);
        total = _mm512_dpbf16_ps(total, both, ones);
    }
    return _mm512_reduce_add_ps(total);
}

/* Fold a chunk into the states of some rows: what they have is rescaled where a score is larger than all before. */
INLINE void run_tile(const Args *args, const Tile *tile, Rows *rows, const Part *parts, int count, int num_rows,
                     int is_first, const int is_bf16) {
    (void)is_bf16; /* always */
    const int dim = args->dim, blocks = (count + 2 * LANES - 1) / (2 * LANES) * 2;
    const float factor = args->scale * 1.44269504f;
    States of;
    of.is_first = is_first;
    for (int r = 0; r < num_rows; r++) {
        of.q[r] = (const uint16_t *)args->q + parts[r].at * dim;
        of.acc[r] = parts[r].valid > 0 ? &args->acc[parts[r].at * dim] : rows->hidden;
    }
    multiply_queries(&of, tile->keys, rows->scores, dim / 2, num_rows, (count + LANES - 1) / LANES);
    float tops[LANES] = {0}, known[LANES] = {0};
    for (int r = 0; r < num_rows; r++) {
        float *scores = &rows->scores[r * CHUNK];
        const int valid = parts[r].valid > 0 ? parts[r].valid : 0;
        if (valid < blocks * LANES) hide(scores, valid, blocks * LANES);
        const float largest = largest_of(scores, blocks);
        known[r] = is_first ? largest : args->stat[parts[r].at * 2];
        tops[r] = known[r] > largest ? known[r] : largest;
    }
    float before[LANES];
    const __m512 less = _mm512_sub_ps(_mm512_loadu_ps(known), _mm512_loadu_ps(tops));
    _mm512_storeu_ps(before, power_of_two(_mm512_mul_ps(less, _mm512_set1_ps(factor))));
    for (int r = 0; r < num_rows; r++) {
        const float sum = weigh(&rows->scores[r * CHUNK], &rows->weights[r * CHUNK], blocks, factor, tops[r]);
        float *stat = &args->stat[parts[r].at * 2];
        of.before[r] = before[r];
        if (parts[r].valid <= 0) continue;
        stat[0] = tops[r];
        stat[1] = is_first ? sum : stat[1] * before[r] + sum;
    }
    multiply_weights(&of, rows->weights, tile->values, dim, (count + 1) / 2, num_rows);
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
