/* The layers of a decoder in bfloat16 one after the other, without going back to Python in between.
 *
 * What lies between one layer's attention and the next one's is a row's own business. In a small step all threads share
 * each operation; in a large one each takes a block of rows from one attention to the next, and what an operation
 * leaves for the one after it stays in that core's cache.
 */

#include <omp.h>

#include "step.h"

typedef uint16_t bf16;

/* Rows of a block at least: for these weights still come faster from the cache of all cores. */
#define LEAST_BLOCK (3 * LINEAR_TILE)

/* One layer: what its operations take, but for what differs from step to step or from block to block. */
typedef struct {
    const void *norms[2]; /* (hidden_size,) before attention and before the MLP */
    Layer qkv, out, gated, down;
    Split split;
} DecoderLayer;

/* What the layers know of a step's tokens. */
typedef struct {
    const Args *attention; /* but for queries, keys, values and out */
    const float *cosine;   /* see Split */
    const float *sine;
    const int64_t *slots;
    int32_t num_tokens;
} Tokens;

/* Memory between operations. block_rows, num_threads: of the first four, (num_threads * block_rows, size) each. */
typedef struct {
    bf16 *normed, *qkv, *gated, *delta;
    bf16 *q, *attended; /* (num_tokens, num_heads, dim) */
    int32_t block_rows, num_threads;
} Room;

typedef struct {
    const DecoderLayer *layers;
    bf16 *x;             /* (num_tokens, hidden_size): the embeddings, then the output */
    const int64_t *kept; /* (last.num_tokens,) ascending, the tokens of which the last layer is computed; none: of all */
    Tokens all, last;
    Room room;
    int32_t num_layers;
} DecoderStep;

/* Rows [begin, begin + count) of a step, in the room from row `at` on; by one thread alone or by all. */
typedef struct {
    int begin, count, at, is_alone;
} Block;

static void multiply(const Layer *layer, const bf16 *x, bf16 *out, const Block *block, int num_skipped) {
    Layer now = *layer;
    now.x = x;
    now.out = out;
    now.num_rows = block->count;
    now.num_skipped = num_skipped;
    if (block->is_alone)
        bough_linear_alone(&now);
    else
        bough_linear(&now);
}

/* x += delta, or not; normed as well, or not. */
static void norm(const DecoderStep *step, const DecoderLayer *layer, int which, const Block *block, const bf16 *delta,
                 bf16 *normed) {
    const int size = layer->qkv.in_size;
    bf16 *x = step->x + (ptrdiff_t)block->begin * size;
    (block->is_alone ? bough_norm_alone : bough_add_rms_norm)(x, delta, layer->norms[which], normed, block->count, size,
                                                              layer->split.eps, 1);
}

/* Queries, keys and values of a layer, whose input is x + delta; without queries, keys and values alone. */
static void project(const DecoderStep *step, const Tokens *tokens, const DecoderLayer *layer, const Block *block,
                    const bf16 *delta, int has_queries) {
    const Room *room = &step->room;
    bf16 *normed = room->normed + (ptrdiff_t)block->at * layer->qkv.in_size;
    bf16 *qkv = room->qkv + (ptrdiff_t)block->at * layer->qkv.out_size;
    const int q_size = layer->out.in_size;
    norm(step, layer, 0, block, delta, normed);
    multiply(&layer->qkv, normed, qkv, block, has_queries ? 0 : q_size / LINEAR_PANEL);
    Split split = layer->split;
    split.qkv = qkv;
    split.q = has_queries ? room->q + (ptrdiff_t)block->begin * q_size : NULL;
    split.cosine = tokens->cosine + (ptrdiff_t)block->begin * (split.dim / 2);
    split.sine = tokens->sine + (ptrdiff_t)block->begin * (split.dim / 2);
    split.slots = tokens->slots + block->begin;
    split.num_tokens = block->count;
    if (block->is_alone)
        bough_split_alone(&split);
    else
        bough_split_rotate_store(&split);
}

/* What follows attention. x + what is returned is the layer's output. */
static const bf16 *conclude(const DecoderStep *step, const DecoderLayer *layer, const Block *block) {
    const Room *room = &step->room;
    const bf16 *attended = room->attended + (ptrdiff_t)block->begin * layer->out.in_size;
    bf16 *normed = room->normed + (ptrdiff_t)block->at * layer->gated.in_size;
    bf16 *gated = room->gated + (ptrdiff_t)block->at * layer->down.in_size;
    bf16 *delta = room->delta + (ptrdiff_t)block->at * layer->down.out_size;
    multiply(&layer->out, attended, delta, block, 0);
    norm(step, layer, 1, block, delta, normed);
    multiply(&layer->gated, normed, gated, block, 0);
    multiply(&layer->down, gated, delta, block, 0);
    return delta;
}

/* From the attention of `layer`, if any, to that of the next one, if any. */
static void pass(const DecoderStep *step, const Tokens *tokens, const DecoderLayer *layer, const DecoderLayer *next,
                 const Block *block, int has_queries) {
    const bf16 *delta = layer ? conclude(step, layer, block) : NULL;
    if (next)
        project(step, tokens, next, block, delta, has_queries);
    else
        norm(step, layer, 1, block, delta, NULL);
}

/* Take rows of those that are left: large blocks first, small ones last, so that all threads end together. */
static int take(int *taken, int num_rows, const Room *room, int *begin) {
    int count;
    *begin = __atomic_load_n(taken, __ATOMIC_RELAXED);
    do {
        const int left = num_rows - *begin, share = left / (2 * room->num_threads);
        count = share > LEAST_BLOCK ? share / LINEAR_TILE * LINEAR_TILE : LEAST_BLOCK;
        count = count < room->block_rows ? count : room->block_rows;
        count = count < left ? count : left;
        if (count <= 0) return 0;
    } while (!__atomic_compare_exchange_n(taken, begin, *begin + count, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return count;
}

static void pass_all(const DecoderStep *step, const Tokens *tokens, const DecoderLayer *layer, const DecoderLayer *next,
                     int has_queries) {
    const Room *room = &step->room;
    const int num_rows = tokens->num_tokens;
    if (num_rows <= room->block_rows * room->num_threads) {
        const Block whole = {0, num_rows, 0, 0};
        pass(step, tokens, layer, next, &whole, has_queries);
        return;
    }
    int taken = 0;
#pragma omp parallel num_threads(room->num_threads)
    {
        Block block = {0, 0, omp_get_thread_num() * room->block_rows, 1};
        while ((block.count = take(&taken, num_rows, room, &block.begin)))
            pass(step, tokens, layer, next, &block, has_queries);
    }
}

static void attend(const DecoderStep *step, const Tokens *tokens, const DecoderLayer *layer) {
    const Split *split = &layer->split;
    Args now = *tokens->attention;
    now.q = step->room.q;
    now.k = split->k;
    now.v = split->v;
    now.k_scales = split->k_scales;
    now.v_scales = split->v_scales;
    now.out = step->room.attended;
    bough_attention(&now);
}

/* The rows of x that are kept go to its beginning. */
static void narrow(const DecoderStep *step) {
    const ptrdiff_t size = step->layers->qkv.in_size;
    for (int i = 0; i < step->last.num_tokens; i++)
        memmove(step->x + i * size, step->x + step->kept[i] * size, (size_t)size * sizeof(bf16));
}

/* The last layer is computed twice where not all tokens are kept: for all as far as their keys and values, which gives
 * the kept ones' the bits that they get again. The caller has checked every argument. */
EXPORT void bough_decoder_step(const DecoderStep *step) {
    const DecoderLayer *last = step->layers + step->num_layers - 1;
    const Tokens *tokens = &step->all;
    pass_all(step, tokens, NULL, step->layers, !step->kept || last != step->layers);
    for (const DecoderLayer *layer = step->layers; layer < last; layer++) {
        attend(step, tokens, layer);
        pass_all(step, tokens, layer, layer + 1, !step->kept || layer + 1 != last);
    }
    if (step->kept) {
        narrow(step);
        tokens = &step->last;
        if (!tokens->num_tokens) return;
        pass_all(step, tokens, NULL, last, 1);
    }
    attend(step, tokens, last);
    pass_all(step, tokens, last, NULL, 0);
}
