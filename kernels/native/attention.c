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

#include "vectors.h"

#define CHUNK 128
#define MAX_DIM 256
#define LINE_BYTES 64

/* How many positions before they are read keys and values are asked for. */
#define AHEAD 64

typedef struct {
    const void *q; /* (num_tokens, num_heads, dim) */
    const void *k; /* (num_slots, num_kv_heads, dim), like q or bytes */
    const void *v;
    const float *k_scales; /* (num_slots, num_kv_heads) where keys and values are bytes, else none */
    const float *v_scales;
    void *out;   /* like q */
    float *acc;  /* (num_tokens, num_heads, dim) */
    float *stat; /* (num_tokens, num_heads, 2): largest score, sum of weights */
    const int32_t *pages;     /* page ids, one sequence's after another's */
    const int32_t *positions; /* (num_tokens,) of each query */
    const int32_t *rows;      /* query tokens, one unit's after another's */
    const int32_t *units;     /* (num_units, UNIT_FIELDS) */
    const int32_t *levels;    /* (num_levels + 1,) units of level i: [levels[i], levels[i + 1]) */
    int32_t num_levels;
    int32_t num_heads, num_kv_heads, dim, page_size;
    int32_t is_bf16; /* of q and out */
    float scale;
} Args;

/* How keys and values are stored. */
enum { KV_FLOAT, KV_BF16, KV_BYTES };

/* Fields of a unit. IS_FIRST: its rows have no state yet. IS_LAST: what is folded then is the result. */
enum { PAGES_AT, CHUNK_BEGIN, CHUNK_END, ROWS_BEGIN, ROWS_END, IS_FIRST, IS_LAST, UNIT_FIELDS };

/* Keys of one chunk by channel, its values by key, in float. */
typedef struct {
    float keys[MAX_DIM * CHUNK] __attribute__((aligned(64)));   /* (dim, CHUNK) */
    float values[CHUNK * MAX_DIM] __attribute__((aligned(64))); /* (CHUNK, dim) */
} Tile;

/* Exchange rows and lanes of a square: after the step of width w, bit w of row and lane number have changed places. */
INLINE void transpose(vec m[LANES]) {
#define STEP(w)                                                                        \
    {                                                                                  \
        ivec low, high;                                                                \
        for (int i = 0; i < LANES; i++) {                                              \
            low[i] = (i & w) ? LANES + i - w : i;                                      \
            high[i] = (i & w) ? LANES + i : i + w;                                     \
        }                                                                              \
        for (int r = 0; r < LANES; r++)                                                \
            if (!(r & w)) {                                                            \
                vec a = m[r], b = m[r + w];                                            \
                m[r] = __builtin_shuffle(a, b, low);                                   \
                m[r + w] = __builtin_shuffle(a, b, high);                              \
            }                                                                          \
    }
    STEP(1) STEP(2) STEP(4) STEP(8)
#undef STEP
}

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

INLINE ptrdiff_t slot_of(const Args *args, const int32_t *pages, int position) {
    return (ptrdiff_t)pages[position / args->page_size] * args->page_size + position % args->page_size;
}

/* Ask for the keys and values of a block early: one head's lie apart, and no hardware foresees where. */
INLINE void prefetch(const Args *args, const int32_t *pages, int first, int end, int head, const int kind) {
    const int row_bytes = args->dim * (kind == KV_BYTES ? 1 : kind == KV_BF16 ? 2 : 4);
    for (int position = first; position < first + LANES && position < end; position++) {
        const ptrdiff_t at = (slot_of(args, pages, position) * args->num_kv_heads + head) * row_bytes;
        for (int line = 0; line < row_bytes; line += LINE_BYTES) {
            __builtin_prefetch((const char *)args->k + at + line, 0, 2);
            __builtin_prefetch((const char *)args->v + at + line, 0, 2);
        }
    }
}

/* Read the first `count` positions of a chunk; what lies beyond them in the last block becomes zero, unread. end: of
 * the unit, up to which what follows is asked for. */
INLINE void read_tile(Tile *tile, const Args *args, const int32_t *pages, int first, int count, int end, int head,
                      const int kind) {
    const int dim = args->dim;
    const int word_channels = LANES * (kind == KV_BYTES ? 4 : kind == KV_BF16 ? 2 : 1);
    for (int begin = 0; begin < count; begin += LANES) {
        const int valid = count - begin < LANES ? count - begin : LANES;
        prefetch(args, pages, first + begin + AHEAD, end, head, kind);
        ptrdiff_t at[LANES];
        vec k_scales = {}, v_scales = {};
        for (int i = 0; i < valid; i++) {
            const ptrdiff_t row = slot_of(args, pages, first + begin + i) * args->num_kv_heads + head;
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

/* Up to ROW_TILE queries of one head group against a tile. */
#define ROW_TILE 4

typedef struct {
    float q[ROW_TILE * MAX_DIM] __attribute__((aligned(64)));
    float scores[ROW_TILE * CHUNK] __attribute__((aligned(64)));
    float means[ROW_TILE * MAX_DIM] __attribute__((aligned(64)));
} Rows;

INLINE void attend(Rows *rows, const Tile *tile, int dim, int count, const int num_rows) {
    product_of_rows(rows->q, dim, tile->keys, CHUNK, rows->scores, CHUNK, dim, num_rows, (count + LANES - 1) / LANES);
}

INLINE void gather(Rows *rows, const Tile *tile, int dim, int count, const int num_rows) {
    product_of_rows(rows->scores, CHUNK, tile->values, dim, rows->means, dim, count, num_rows, dim / LANES);
}

/* Turn the first `valid` scores into weights, the others up to `count` into 0; return the largest score and the sum. */
INLINE void weigh(float *scores, int valid, int count, float *largest, float *sum) {
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

/* Fold a chunk into a row's state. */
INLINE void fold(float *acc, float *stat, const float *means, float largest, float sum, int dim, int is_first) {
    if (is_first) {
        memcpy(acc, means, (size_t)dim * sizeof(float));
        stat[0] = largest;
        stat[1] = sum;
        return;
    }
    const float top = stat[0] > largest ? stat[0] : largest;
    const float before = exp_one(stat[0] - top), now = exp_one(largest - top);
    for (int d = 0; d < dim; d += LANES) {
        vec_u *into = (vec_u *)&acc[d];
        *into = (vec_u)((vec)*into * before + *(const vec *)&means[d] * now);
    }
    stat[0] = top;
    stat[1] = stat[1] * before + sum * now;
}

/* One unit's chunk: all its rows, a tile of them at a time. A row is a (query token, head of the group). */
INLINE void run_chunk(const Args *args, const int32_t *unit, const Tile *tile, Rows *rows, int chunk, int head,
                      const int is_bf16) {
    const int dim = args->dim, group = args->num_heads / args->num_kv_heads, first = chunk * CHUNK;
    const int num_rows = (unit[ROWS_END] - unit[ROWS_BEGIN]) * group;
    for (int begin = 0; begin < num_rows; begin += ROW_TILE) {
        const int here = num_rows - begin < ROW_TILE ? num_rows - begin : ROW_TILE;
        ptrdiff_t at[ROW_TILE]; /* (token, head), flat */
        int valid[ROW_TILE], count = 0;
        for (int r = 0; r < here; r++) {
            const int token = args->rows[unit[ROWS_BEGIN] + (begin + r) / group];
            at[r] = (ptrdiff_t)token * args->num_heads + (ptrdiff_t)head * group + (begin + r) % group;
            const int left = args->positions[token] + 1 - first;
            valid[r] = left < CHUNK ? left : CHUNK;
            count = valid[r] > count ? valid[r] : count;
        }
        if (count <= 0) continue;
        for (int r = 0; r < here; r++)
            for (int d = 0; d < dim; d += LANES)
                *(vec *)&rows->q[r * dim + d] = load(args->q, at[r] * dim + d, is_bf16) * args->scale;
        switch (here) {
            case 1: attend(rows, tile, dim, count, 1); break;
            case 2: attend(rows, tile, dim, count, 2); break;
            case 3: attend(rows, tile, dim, count, 3); break;
            default: attend(rows, tile, dim, count, 4);
        }
        float largest[ROW_TILE], sum[ROW_TILE];
        for (int r = 0; r < here; r++)
            weigh(&rows->scores[r * CHUNK], valid[r] > 0 ? valid[r] : 0, count, &largest[r], &sum[r]);
        switch (here) {
            case 1: gather(rows, tile, dim, count, 1); break;
            case 2: gather(rows, tile, dim, count, 2); break;
            case 3: gather(rows, tile, dim, count, 3); break;
            default: gather(rows, tile, dim, count, 4);
        }
        const int is_first = unit[IS_FIRST] && chunk == unit[CHUNK_BEGIN];
        for (int r = 0; r < here; r++)
            if (valid[r] > 0)
                fold(&args->acc[at[r] * dim], &args->stat[at[r] * 2], &rows->means[r * dim], largest[r], sum[r], dim,
                     is_first);
    }
}

INLINE void finish(const Args *args, const int32_t *unit, int head, const int is_bf16) {
    const int dim = args->dim, group = args->num_heads / args->num_kv_heads;
    for (int i = unit[ROWS_BEGIN]; i < unit[ROWS_END]; i++)
        for (int g = 0; g < group; g++) {
            const ptrdiff_t at = (ptrdiff_t)args->rows[i] * args->num_heads + (ptrdiff_t)head * group + g;
            const float sum = args->stat[at * 2 + 1];
            for (int d = 0; d < dim; d += LANES)
                store(args->out, at * dim + d, (vec) * (const vec_u *)&args->acc[at * dim + d] / sum, is_bf16);
        }
}

INLINE void run_unit_as(const Args *args, const int32_t *unit, int head, const int is_bf16, const int kind) {
    Tile tile;
    Rows rows;
    int last = 0; /* position of the unit's last row */
    for (int i = unit[ROWS_BEGIN]; i < unit[ROWS_END]; i++) {
        const int position = args->positions[args->rows[i]];
        last = position > last ? position : last;
    }
    const int32_t *pages = args->pages + unit[PAGES_AT];
    const int end = last + 1 < unit[CHUNK_END] * CHUNK ? last + 1 : unit[CHUNK_END] * CHUNK;
    for (int chunk = unit[CHUNK_BEGIN]; chunk < unit[CHUNK_END]; chunk++) {
        const int left = last + 1 - chunk * CHUNK;
        read_tile(&tile, args, pages, chunk * CHUNK, left < CHUNK ? left : CHUNK, end, head, kind);
        run_chunk(args, unit, &tile, &rows, chunk, head, is_bf16);
    }
    if (unit[IS_LAST]) finish(args, unit, head, is_bf16);
}

CLONES static void run_unit(const Args *args, const int32_t *unit, int head) {
    if (args->k_scales && args->is_bf16)
        run_unit_as(args, unit, head, 1, KV_BYTES);
    else if (args->k_scales)
        run_unit_as(args, unit, head, 0, KV_BYTES);
    else if (args->is_bf16)
        run_unit_as(args, unit, head, 1, KV_BF16);
    else
        run_unit_as(args, unit, head, 0, KV_FLOAT);
}

/* Compute one layer. The caller has checked every argument. */
EXPORT void bough_attention(const Args *args) {
#pragma omp parallel
    for (int level = 0; level < args->num_levels; level++) {
        const int begin = args->levels[level], heads = args->num_kv_heads;
        const int num_items = (args->levels[level + 1] - begin) * heads;
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < num_items; item++)
            run_unit(args, &args->units[(ptrdiff_t)(begin + item / heads) * UNIT_FIELDS], item % heads);
    }
}
