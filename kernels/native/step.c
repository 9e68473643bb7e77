/* The layers of a decoder one after the other, without going back to Python in between. */

#include "step.h"

/* One layer: what its operations take, but for what differs from step to step. */
typedef struct {
    const void *norms[2]; /* (hidden_size,) before attention and before the MLP */
    Layer qkv, out, gate_up, down;
    Split split;
    void *attended; /* (num_tokens, num_heads, dim) */
} DecoderLayer;

typedef struct {
    const DecoderLayer *layers;
    const Args *attention; /* but for queries, keys, values and out */
    void *x;               /* (num_tokens, hidden_size): the embeddings; then what the last delta is to be added to */
    const float *cosine;   /* see Split */
    const float *sine;
    const int64_t *slots;
    int32_t num_layers, num_tokens;
} DecoderStep;

static void linear(const Layer *layer, int32_t num_rows) {
    Layer now = *layer;
    now.num_rows = num_rows;
    bough_linear(&now);
}

static void attend(const DecoderStep *step, const Split *split, void *out) {
    Args now = *step->attention;
    now.q = split->q;
    now.k = split->k;
    now.v = split->v;
    now.k_scales = split->k_scales;
    now.v_scales = split->v_scales;
    now.out = out;
    bough_attention(&now);
}

static void norm(const DecoderStep *step, const DecoderLayer *layer, int which, const void *delta, const Layer *next) {
    bough_add_rms_norm(step->x, delta, layer->norms[which], (void *)next->x, step->num_tokens, next->in_size,
                       layer->split.eps, next->is_bf16);
}

/* x and the last layer's down.out, whose sum is the decoder's output. The caller has checked every argument. */
EXPORT void bough_decoder_step(const DecoderStep *step) {
    const void *delta = NULL;
    for (int i = 0; i < step->num_layers; i++) {
        const DecoderLayer *layer = &step->layers[i];
        norm(step, layer, 0, delta, &layer->qkv);
        linear(&layer->qkv, step->num_tokens);
        Split split = layer->split;
        split.num_tokens = step->num_tokens;
        split.cosine = step->cosine;
        split.sine = step->sine;
        split.slots = step->slots;
        bough_split_rotate_store(&split);
        attend(step, &split, layer->attended);
        linear(&layer->out, step->num_tokens);
        norm(step, layer, 1, layer->out.out, &layer->gate_up);
        linear(&layer->gate_up, step->num_tokens);
        bough_gated_silu(layer->gate_up.out, (void *)layer->down.x, step->num_tokens, layer->down.in_size,
                         layer->down.is_bf16);
        linear(&layer->down, step->num_tokens);
        delta = layer->down.out;
    }
}
