/* Attention over paged KV on the CPU, read in place.
 *
 * Every query row folds the keys of its sequence in chunks of CHUNK absolute positions, in order:
 *
 *     state = (largest score m, sum of weights l, weighted values acc)        m' = max(m, m_c), both sides rescaled
 *
 * A chunk's own numbers, and the fold, are the same instructions for a row whoever shares its unit of work, however
 * many rows there are and wherever its prefix was computed: a row's bits depend on its position and its tokens only.
 *
 * A unit is some rows over some chunks of one key/value head. The rows of a unit may belong to many sequences, as long
 * as those chunks are the same pages for all: a shared prefix is read once. Units run level by level; a row passes
 * through one unit of a level at most, and goes on from the state that the level before left.
 */

#include "attention.h"

#include <omp.h>

/* Keys of one chunk by channel, its values by key, in float. */
typedef struct {
    float keys[MAX_DIM * CHUNK] __attribute__((aligned(64)));   /* (dim, CHUNK) */
    float values[CHUNK * MAX_DIM] __attribute__((aligned(64))); /* (CHUNK, dim) */
} Tile;

INLINE vec load_kv(const void *base, ptrdiff_t at, float scale, const int kind) {
    return kind == KV_BYTES ? load_bytes(base, at) * scale : load(base, at, kind == KV_BF16);
}

/* A block of keys by channel: lane i of (*into)[c * CHUNK] is channel c of the key at[i], zero from `valid` keys on. */
INLINE void turn(float *into, const Args *args, const ptrdiff_t *at, int valid, vec scales, const int kind) {
    vec m[LANES];
    for (int i = 0; i < LANES; i++) m[i] = i < valid ? load_kv(args->k, at[i], scales[i], kind) : (vec){};
    transpose(m);
    for (int i = 0; i < LANES; i++) *(vec *)&into[i * CHUNK] = m[i];
}

/* The same for LANES * n channels, n of them in 32 bits: what is exchanged are words, and a word is parted after it. */
INLINE void turn_words(float *into, const Args *args, const ptrdiff_t *at, int valid, vec scales, const int kind) {
    const int n = kind == KV_BYTES ? 4 : 2, width = (int)sizeof(float) / n;
    vec m[LANES];
    for (int i = 0; i < LANES; i++)
        m[i] = i < valid ? (vec) * (const vec_u *)((const char *)args->k + at[i] * width) : (vec){};
    transpose(m);
    for (int i = 0; i < LANES; i++)
        for (int c = 0; c < n; c++) {
            const ivec word = (ivec)m[i];
            vec channel;
            if (kind == KV_BYTES)
                channel = __builtin_convertvector((word << (24 - 8 * c)) >> 24, vec) * scales;
            else
                channel = (vec)(c ? word & (int32_t)0xffff0000 : word << 16);
            *(vec *)&into[(i * n + c) * CHUNK] = channel;
        }
}

/* Read the first `count` positions of a chunk; what lies beyond them in the last block becomes zero, unread. */
INLINE void read_tile(Tile *tile, const Args *args, const Span *span, int first, int count, const int kind) {
    const int dim = args->dim;
    const int word_channels = LANES * (kind == KV_BYTES ? 4 : kind == KV_BF16 ? 2 : 1);
    Place here = place_of(args, span->pages, first);
    for (int begin = 0; begin < count; begin += LANES) {
        const int valid = count - begin < LANES ? count - begin : LANES;
        ask_ahead(args, span, first + begin, kind);
        ptrdiff_t at[LANES];
        vec k_scales = {}, v_scales = {};
        for (int i = 0; i < valid; i++) {
            const ptrdiff_t row = next_slot(args, &here) * args->num_kv_heads + span->head;
            at[i] = row * dim;
            if (kind == KV_BYTES) {
                k_scales[i] = args->k_scales[row];
                v_scales[i] = args->v_scales[row];
            }
        }
        int d = 0;
        ptrdiff_t from[LANES];
        for (; kind != KV_FLOAT && d + word_channels <= dim; d += word_channels) {
            for (int i = 0; i < valid; i++) from[i] = at[i] + d;
            turn_words(&tile->keys[d * CHUNK + begin], args, from, valid, k_scales, kind);
        }
        for (; d < dim; d += LANES) {
            for (int i = 0; i < valid; i++) from[i] = at[i] + d;
            turn(&tile->keys[d * CHUNK + begin], args, from, valid, k_scales, kind);
        }
        for (int i = 0; i < LANES; i++)
            for (int e = 0; e < dim; e += LANES)
                *(vec *)&tile->values[(begin + i) * dim + e] =
                    i < valid ? load_kv(args->v, at[i] + e, v_scales[i], kind) : (vec){};
    }
}

/* out[r][j] = sum over t < depth of a[r][t] * b[t][j], in the order of t, for `rows` rows and `vecs` vectors of j. */
INLINE void product(const float *a, int a_stride, const float *b, int b_stride, float *out, int out_stride, int depth,
                    const int rows, const int vecs) {
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) sums[r][j] = (vec){};
    for (int t = 0; t < depth; t++) {
        vec right[4];
        for (int j = 0; j < vecs; j++) right[j] = *(const vec *)&b[t * b_stride + j * LANES];
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vecs; j++) sums[r][j] += a[r * a_stride + t] * right[j];
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) *(vec *)&out[r * out_stride + j * LANES] = sums[r][j];
}

INLINE void product_of_rows(const float *a, int a_stride, const float *b, int b_stride, float *out, int out_stride,
                            int depth, const int rows, int vecs) {
    int j = 0;
    for (; j + 4 <= vecs; j += 4)
        product(a, a_stride, b + j * LANES, b_stride, out + j * LANES, out_stride, depth, rows, 4);
    for (; j < vecs; j++)
        product(a, a_stride, b + j * LANES, b_stride, out + j * LANES, out_stride, depth, rows, 1);
}

#define UNITS_PER_THREAD 4
#define FEW_ROWS 8

/* Up to ROW_TILE queries of one head group are computed at a time. */
#define ROW_TILE 4

/* The queries of a tile, scaled; their scores, then weights; the weighted values. */
typedef struct {
    float q[ROW_TILE * MAX_DIM] __attribute__((aligned(64)));
    float scores[ROW_TILE * CHUNK] __attribute__((aligned(64)));
    float means[ROW_TILE * MAX_DIM] __attribute__((aligned(64)));
    float largest[ROW_TILE], sum[ROW_TILE]; /* of a chunk's scores; of its weights */
} Rows;

INLINE void load_query(Rows *rows, int r, const Args *args, ptrdiff_t at, const int is_bf16) {
    for (int d = 0; d < args->dim; d += LANES)
        *(vec *)&rows->q[r * args->dim + d] = load(args->q, at + d, is_bf16) * args->scale;
}

/* Not inlined: one copy of it serves all types of keys, and compiling it is most of the time of an installation. */
CLONES static void multiply(const float *a, int a_stride, const float *b, int b_stride, float *out, int out_stride,
                            int depth, int rows, int vecs) {
    switch (rows) {
        case 1: product_of_rows(a, a_stride, b, b_stride, out, out_stride, depth, 1, vecs); break;
        case 2: product_of_rows(a, a_stride, b, b_stride, out, out_stride, depth, 2, vecs); break;
        case 3: product_of_rows(a, a_stride, b, b_stride, out, out_stride, depth, 3, vecs); break;
        default: product_of_rows(a, a_stride, b, b_stride, out, out_stride, depth, 4, vecs);
    }
}

INLINE void attend(Rows *rows, const Tile *tile, const Args *args, int count, int num_rows) {
    const int dim = args->dim;
    multiply(rows->q, dim, tile->keys, CHUNK, rows->scores, CHUNK, dim, num_rows, (count + LANES - 1) / LANES);
}

INLINE void gather(Rows *rows, const Tile *tile, const Args *args, int count, int num_rows) {
    const int dim = args->dim;
    multiply(rows->scores, CHUNK, tile->values, dim, rows->means, dim, count, num_rows, dim / LANES);
}

/* Turn the first `valid` scores into weights, the others up to `count` into 0; return the largest score and the sum. */
INLINE void weigh(Rows *rows, int r, int valid, int count, float *largest, float *sum) {
    float *scores = &rows->scores[r * CHUNK];
    const int blocks = (count + LANES - 1) / LANES;
    for (int i = valid; i < blocks * LANES; i++) scores[i] = -__builtin_inff();
    vec top = *(vec *)scores;
    for (int b = 1; b < blocks; b++) top = larger(top, *(vec *)&scores[b * LANES]);
    const float m = horizontal_max(top);
    vec total = (vec){};
    for (int b = 0; b < blocks; b++) {
        const vec weights = exp_of(*(vec *)&scores[b * LANES] - m);
        *(vec *)&scores[b * LANES] = weights;
        total += weights;
    }
    *largest = m;
    *sum = horizontal_sum(total);
}

/* Fold a chunk into the states of up to LANES / 2 rows, whose exponentials are computed together. */
INLINE void fold(const Args *args, const Rows *rows, const Part *parts, int num_rows, int is_first) {
    const int dim = args->dim;
    float differences[LANES] = {0}, tops[LANES / 2];
    for (int r = 0; r < num_rows; r++) {
        const float known = args->stat[parts[r].at * 2];
        if (is_first || parts[r].valid <= 0) continue;
        tops[r] = known > rows->largest[r] ? known : rows->largest[r];
        differences[r] = known - tops[r];
        differences[r + LANES / 2] = rows->largest[r] - tops[r];
    }
    vec factors = {};
    if (!is_first) factors = exp_of(load(differences, 0, 0));
    for (int r = 0; r < num_rows; r++) {
        float *acc = &args->acc[parts[r].at * dim], *stat = &args->stat[parts[r].at * 2];
        if (parts[r].valid <= 0) continue;
        if (is_first) {
            memcpy(acc, &rows->means[r * dim], (size_t)dim * sizeof(float));
            stat[0] = rows->largest[r];
            stat[1] = rows->sum[r];
            continue;
        }
        const float before = factors[r], now = factors[r + LANES / 2];
        for (int d = 0; d < dim; d += LANES) {
            vec_u *into = (vec_u *)&acc[d];
            *into = (vec_u)((vec)*into * before + *(const vec *)&rows->means[r * dim + d] * now);
        }
        stat[0] = tops[r];
        stat[1] = stat[1] * before + rows->sum[r] * now;
    }
}

/* Some rows and one chunk. */
INLINE void run_tile(const Args *args, const Tile *tile, Rows *rows, const Part *parts, int count, int num_rows,
                     int is_first, const int is_bf16) {
    for (int r = 0; r < num_rows; r++) load_query(rows, r, args, parts[r].at * args->dim, is_bf16);
    attend(rows, tile, args, count, num_rows);
    for (int r = 0; r < num_rows; r++)
        weigh(rows, r, parts[r].valid > 0 ? parts[r].valid : 0, count, &rows->largest[r], &rows->sum[r]);
    gather(rows, tile, args, count, num_rows);
    fold(args, rows, parts, num_rows, is_first);
}

#include "attention_unit.h"

CLONES static void run_unit(const Args *args, const int32_t *unit, int head, int end_head) {
    if (args->k_scales && args->is_bf16)
        run_unit_as(args, unit, head, end_head, 1, KV_BYTES);
    else if (args->k_scales)
        run_unit_as(args, unit, head, end_head, 0, KV_BYTES);
    else if (args->is_bf16)
        run_unit_as(args, unit, head, end_head, 1, KV_BF16);
    else
        run_unit_as(args, unit, head, end_head, 0, KV_FLOAT);
}

/* Whether units of a level are run with all their heads by one thread: what lies together is then read together. Where
 * there are enough units for that, and their rows are too few to make up for the reading. */
static int runs_whole(const Args *args, int begin, int end, int num_threads) {
    const int group = args->num_heads / args->num_kv_heads;
    if (end - begin < UNITS_PER_THREAD * num_threads) return 0;
    for (int i = begin; i < end; i++) {
        const int32_t *unit = &args->units[(ptrdiff_t)i * UNIT_FIELDS];
        if ((unit[ROWS_END] - unit[ROWS_BEGIN]) * group > FEW_ROWS) return 0;
    }
    return 1;
}

/* Compute one layer. The caller has checked every argument. */
EXPORT void bough_attention(const Args *args) {
    const int in_pairs = args->is_bf16 && !args->k_scales && args->dim % (2 * LANES) == 0 && bough_has_pairs();
#pragma omp parallel
    for (int level = 0; level < args->num_levels; level++) {
        const int begin = args->levels[level], end = args->levels[level + 1];
        const int parts = runs_whole(args, begin, end, omp_get_num_threads()) ? 1 : args->num_kv_heads;
        const int heads = args->num_kv_heads / parts;
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < (end - begin) * parts; item++) {
            const int32_t *unit = &args->units[(ptrdiff_t)(begin + item / parts) * UNIT_FIELDS];
            const int head = item % parts * heads;
            if (in_pairs)
                bough_run_pairs(args, unit, head, head + heads);
            else
                run_unit(args, unit, head, head + heads);
        }
    }
}
