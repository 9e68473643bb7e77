/* Attention over paged KV on the CPU: what both ways of computing it share (attention.c, attention_pairs.c). */

#pragma once

#include "vectors.h"

#define CHUNK 128
#define MAX_DIM 256

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

/* Whether this processor multiplies pairs of bfloat16 (AVX512_BF16), and what runs a unit so; see attention_pairs.c. */
int bough_has_pairs(void) HIDDEN;
void bough_run_pairs(const Args *args, const int32_t *unit, int head, int end_head) HIDDEN;

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

/* Where a position lies: it is divided by the size of a page once, and then goes on from slot to slot. */
typedef struct {
    const int32_t *page;
    int offset;
} Place;

INLINE Place place_of(const Args *args, const int32_t *pages, int position) {
    return (Place){pages + position / args->page_size, position % args->page_size};
}

INLINE ptrdiff_t next_slot(const Args *args, Place *place) {
    const ptrdiff_t slot = (ptrdiff_t)*place->page * args->page_size + place->offset;
    if (++place->offset == args->page_size) {
        place->page++;
        place->offset = 0;
    }
    return slot;
}

/* What a unit reads of one head: positions [begin, end) of these pages. then_next: the next head's will be read next. */
typedef struct {
    const int32_t *pages;
    int begin, end, head, then_next;
} Span;

INLINE void prefetch(const Args *args, const Span *span, int position, int count, int head, const int kind) {
    const int row_bytes = args->dim * (kind == KV_BYTES ? 1 : kind == KV_BF16 ? 2 : 4);
    Place place = place_of(args, span->pages, position);
    for (int i = 0; i < count && position + i < span->end; i++) {
        const ptrdiff_t at = (next_slot(args, &place) * args->num_kv_heads + head) * row_bytes;
        for (int line = 0; line < row_bytes; line += LINE_BYTES) {
            __builtin_prefetch((const char *)args->k + at + line, 0, 2);
            __builtin_prefetch((const char *)args->v + at + line, 0, 2);
        }
    }
}

/* Ask for what is read AHEAD positions after a block: one head's lie apart, and no hardware foresees where. */
INLINE void ask_ahead(const Args *args, const Span *span, int position, const int kind) {
    const int blocks = (span->end - span->begin + LANES - 1) / LANES;
    const int ahead = position + AHEAD, beyond = ahead - (span->begin + blocks * LANES);
    if (beyond < 0)
        prefetch(args, span, ahead, LANES, span->head, kind);
    else if (span->then_next)
        prefetch(args, span, span->begin + beyond, LANES, span->head + 1, kind);
}

/* A row of a tile: where it belongs, how many of a chunk's positions it may see, none if it has no part in the chunk. */
typedef struct {
    ptrdiff_t at; /* (token, head), flat */
    int valid;
} Part;
