/* The likeliest token of each row of logits. */

#include "vectors.h"

/* Fewer elements than this are looked at by the calling thread: to wake another takes longer. */
#define WORTH_A_THREAD 32768

/* The first of the largest of x[at .. at + size), -1 if one is not finite. The last LANES may be looked at twice. */
INLINE int64_t first_largest(const void *x, ptrdiff_t at, int size, const int is_bf16) {
    vec best = load(x, at, is_bf16), strange = best - best;
    ivec where = (ivec){};
    for (int i = LANES; i < size; i += LANES) {
        const int from = i + LANES <= size ? i : size - LANES;
        const vec now = load(x, at + from, is_bf16);
        strange += now - now;
        const ivec is = now > best;
        best = (vec)(((ivec)now & is) | ((ivec)best & ~is));
        where = (is & from) | (where & ~is);
    }
    const float largest = horizontal_max(best);
    if (horizontal_sum(strange) != 0.0f) return -1; /* what is not finite is not 0 less itself, but NaN */
    int64_t first = size;
    for (int lane = 0; lane < LANES; lane++)
        if (best[lane] == largest && where[lane] + lane < first) first = where[lane] + lane;
    return first;
}

CLONES static int64_t row_of(const void *x, ptrdiff_t at, int size, int is_bf16) {
    return is_bf16 ? first_largest(x, at, size, 1) : first_largest(x, at, size, 0);
}

/* tokens: (num_rows,), the lowest of the likeliest ids of each row of logits (num_rows, size), size >= LANES; -1 where
 * a logit is not finite. */
EXPORT void bough_likeliest(const void *logits, int64_t *tokens, int32_t num_rows, int32_t size, int32_t is_bf16) {
#pragma omp parallel for if ((ptrdiff_t)num_rows * size >= WORTH_A_THREAD)
    for (int row = 0; row < num_rows; row++) tokens[row] = row_of(logits, (ptrdiff_t)row * size, size, is_bf16);
}
