/* Linear layers by the processor's dot products of neighbours: two bfloat16 (AVX512_BF16) or four bytes (AVX512_VNNI).
 *
 * A sum runs over the input channels in order, by one instruction: a row's bits depend on that row alone, however many
 * rows there are. Weights lie in panels of PANEL outputs, (in_size / neighbours, PANEL, neighbours) each, so that a
 * panel is one stream of memory; TILE rows pass over it at a time, which is as many sums as there are registers for.
 */

#include "step.h"

#define PANEL LINEAR_PANEL
#define VECS (PANEL / LANES)

/* Rows of x that are done at a time are at most this many bytes: with a panel they stay in a core's cache. */
#define NEAR_BYTES (512 << 10)

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10

#include <omp.h>

#include "nearly.h"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")))
#define TILE LINEAR_TILE

EXPORT int32_t bough_linear_kinds(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("x86-64-v4")) return 0;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return 0;
    return LINEAR_BF16 | LINEAR_BYTES;
}

WIDE INLINE void store_some(void *out, ptrdiff_t at, __m512 x, int count, const int is_bf16) {
    if (count >= LANES && is_bf16) {
        _mm256_storeu_si256((__m256i *)((uint16_t *)out + at), (__m256i)_mm512_cvtneps_pbh(x));
        return;
    }
    if (count >= LANES) {
        store(out, at, (vec)x, 0);
        return;
    }
    char whole[64];
    const size_t width = is_bf16 ? 2 : 4;
    if (is_bf16)
        _mm256_storeu_si256((__m256i *)whole, (__m256i)_mm512_cvtneps_pbh(x));
    else
        store(whole, 0, (vec)x, 0);
    memcpy((char *)out + (size_t)at * width, whole, (size_t)count * width);
}

/* 32 bits of neighbours of a row, in all lanes. */
WIDE INLINE __m512i neighbours(const char *x, ptrdiff_t at) {
    int32_t some;
    memcpy(&some, x + at * 4, 4);
    return _mm512_set1_epi32(some);
}

/* What is asked for while a tile is computed: `lines` lines of memory a step, from `at` on. */
typedef struct {
    const char *at;
    int lines;
} Ahead;

WIDE INLINE void ask(Ahead ahead, int t) {
    for (int i = 0; i < ahead.lines; i++)
        __builtin_prefetch(ahead.at + ((ptrdiff_t)t * ahead.lines + i) * LINE_BYTES, 0, 2);
}

WIDE INLINE void multiply_bf16(const char *x, const char *weight, int steps, __m512 out[TILE][VECS], Ahead ahead,
                               const int rows) {
    __m512 sums[TILE][VECS]; /* in registers: what follows a product reads memory */
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECS; j++) sums[r][j] = _mm512_setzero_ps();
    for (int t = 0; t < steps; t++) {
        ask(ahead, t);
        __m512bh right[VECS];
        for (int j = 0; j < VECS; j++)
            right[j] = (__m512bh)_mm512_loadu_si512(weight + ((ptrdiff_t)t * PANEL + j * LANES) * 4);
        for (int r = 0; r < rows; r++) {
            const __m512bh left = (__m512bh)neighbours(x, (ptrdiff_t)r * steps + t);
            for (int j = 0; j < VECS; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECS; j++) out[r][j] = sums[r][j];
}

WIDE INLINE void multiply_bytes(const char *x, const char *weight, int steps, __m512i out[TILE][VECS], Ahead ahead,
                                const int rows) {
    __m512i sums[TILE][VECS]; /* in registers: what follows a product reads memory */
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECS; j++) sums[r][j] = _mm512_setzero_si512();
    for (int t = 0; t < steps; t++) {
        ask(ahead, t);
        __m512i right[VECS];
        for (int j = 0; j < VECS; j++)
            right[j] = _mm512_loadu_si512(weight + ((ptrdiff_t)t * PANEL + j * LANES) * 4);
        for (int r = 0; r < rows; r++) {
            const __m512i left = neighbours(x, (ptrdiff_t)r * steps + t);
            for (int j = 0; j < VECS; j++) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECS; j++) out[r][j] = sums[r][j];
}

WIDE INLINE __m512 with_bias(const Layer *l, __m512 sum, int at) {
    return l->bias ? _mm512_add_ps(sum, _mm512_loadu_ps(l->bias + at)) : sum;
}

/* The sums of some rows and one panel, as they are stored. */
WIDE INLINE void finish_bf16(const Layer *l, int row, int panel, const int rows, __m512 sums[TILE][VECS]) {
    for (int j = 0; j < VECS; j++) {
        const int at = panel * PANEL + j * LANES;
        if (at >= l->out_size) break;
        for (int r = 0; r < rows; r++)
            store_some(l->out, (ptrdiff_t)(row + r) * l->out_size + at, with_bias(l, sums[r][j], at), l->out_size - at, 1);
    }
}

/* The same where the first half of a panel are gates of the second: silu(gate) * up, rounded once. */
WIDE INLINE void finish_gated(const Layer *l, int row, int panel, const int rows, __m512 sums[TILE][VECS]) {
    for (int j = 0; j < VECS / 2; j++) {
        const int at = panel * PANEL + j * LANES;
        for (int r = 0; r < rows; r++) {
            const __m512 gate = with_bias(l, sums[r][j], at), up = with_bias(l, sums[r][j + VECS / 2], at + PANEL / 2);
            const ptrdiff_t to = (ptrdiff_t)(row + r) * (l->out_size / 2) + panel * (PANEL / 2) + j * LANES;
            store_some(l->out, to, _mm512_mul_ps(silu_nearly(gate), up), LANES, 1);
        }
    }
}

WIDE INLINE void finish_bytes(const Layer *l, int row, int panel, const int rows, __m512i sums[TILE][VECS],
                              const int is_bf16) {
    for (int j = 0; j < VECS; j++) {
        const int at = panel * PANEL + j * LANES;
        if (at >= l->out_size) break;
        for (int r = 0; r < rows; r++) {
            const __m512i centred = _mm512_sub_epi32(sums[r][j], _mm512_loadu_si512(l->offset + at));
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_loadu_ps(l->scales + at));
            const __m512 scale = _mm512_set1_ps(l->row_scales[row + r]);
            const __m512 sum = l->bias ? _mm512_fmadd_ps(scaled, scale, _mm512_loadu_ps(l->bias + at))
                                       : _mm512_mul_ps(scaled, scale);
            store_some(l->out, (ptrdiff_t)(row + r) * l->out_size + at, sum, l->out_size - at, is_bf16);
        }
    }
}

/* Some rows times one panel. */
WIDE INLINE void run_tile(const Layer *l, int row, int panel, Ahead ahead, const int rows, const int kind, const int is_bf16) {
    const int is_bytes = kind == LINEAR_BYTES, steps = l->in_size / (is_bytes ? 4 : 2);
    const char *x = (is_bytes ? (const char *)l->units : (const char *)l->x) + (ptrdiff_t)row * steps * 4;
    const char *weight = (const char *)l->weight + (ptrdiff_t)panel * steps * PANEL * 4;
    if (is_bytes) {
        __m512i sums[TILE][VECS];
        multiply_bytes(x, weight, steps, sums, ahead, rows);
        finish_bytes(l, row, panel, rows, sums, is_bf16);
        return;
    }
    __m512 sums[TILE][VECS];
    if (ahead.lines)
        multiply_bf16(x, weight, steps, sums, ahead, rows);
    else /* a loop of its own: to ask in every step whether anything is to be asked for takes 1.5 % */
        multiply_bf16(x, weight, steps, sums, (Ahead){NULL, 0}, rows);
    if (l->is_gated)
        finish_gated(l, row, panel, rows, sums);
    else
        finish_bf16(l, row, panel, rows, sums);
}

/* The lines of `next`, or none, are asked for during the first tiles, evenly: memory works while products are made. */
WIDE INLINE void run_rows(const Layer *l, int begin, int end, int panel, const char *next, const int kind,
                          const int is_bf16) {
    int tiles = (end - begin + TILE - 1) / TILE;
    const int steps = l->in_size / (kind == LINEAR_BYTES ? 4 : 2), all = PANEL * 4 / LINE_BYTES; /* lines of a step */
    int left = next ? all : 0;
    Ahead now = {next, left / (tiles < 2 ? 1 : tiles < all ? 2 : all)};
    for (int row = begin; row < end; tiles--) {
        const int rows = (end - row) / tiles;
        switch (rows) {
            case 1: run_tile(l, row, panel, now, 1, kind, is_bf16); break;
            case 2: run_tile(l, row, panel, now, 2, kind, is_bf16); break;
            case 3: run_tile(l, row, panel, now, 3, kind, is_bf16); break;
            case 4: run_tile(l, row, panel, now, 4, kind, is_bf16); break;
            case 5: run_tile(l, row, panel, now, 5, kind, is_bf16); break;
            default: run_tile(l, row, panel, now, 6, kind, is_bf16);
        }
        row += rows;
        left -= now.lines;
        now.at += (ptrdiff_t)steps * now.lines * LINE_BYTES;
        if (left <= 0) now.lines = 0;
    }
}

WIDE static void run_panel(const Layer *l, int begin, int end, int panel, const char *next) {
    if (l->kind == LINEAR_BF16)
        run_rows(l, begin, end, panel, next, LINEAR_BF16, 1);
    else if (l->is_bf16)
        run_rows(l, begin, end, panel, next, LINEAR_BYTES, 1);
    else
        run_rows(l, begin, end, panel, next, LINEAR_BYTES, 0);
}

/* x as bytes: nearest to x / scale, ties to even, 128 more; what is not finite makes the scale so. */
WIDE INLINE void row_to_bytes(const Layer *l, int row, const int is_bf16) {
    const ptrdiff_t at = (ptrdiff_t)row * l->in_size;
    vec largest = (vec){}, strange = (vec){};
    for (int i = 0; i < l->in_size; i += LANES) {
        const vec x = load(l->x, at + i, is_bf16);
        largest = larger(larger(x, -x), largest);
        strange += x - x;
    }
    const float scale = horizontal_max(largest) / 127.0f + horizontal_sum(strange);
    const __m512 divisor = _mm512_set1_ps(scale > 0.0f ? scale : 1.0f);
    for (int i = 0; i < l->in_size; i += LANES) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps((__m512)load(l->x, at + i, is_bf16), divisor));
        const __m512i units = _mm512_add_epi32(whole, _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i *)(l->units + at + i), _mm512_cvtepi32_epi8(units));
    }
    l->row_scales[row] = scale;
}

WIDE static void to_bytes(const Layer *l, int row) {
    if (l->is_bf16)
        row_to_bytes(l, row, 1);
    else
        row_to_bytes(l, row, 0);
}

static ptrdiff_t panel_bytes(const Layer *l) {
    return (ptrdiff_t)l->in_size * PANEL * (l->kind == LINEAR_BYTES ? 1 : 2);
}

/* As many rows as NEAR_BYTES hold, in whole tiles. */
static int rows_of_part(const Layer *l) {
    const int most = NEAR_BYTES / (l->in_size * (l->kind == LINEAR_BYTES ? 1 : 2)) / TILE * TILE;
    return most > TILE ? most : TILE;
}

/* The panel that comes `later` panels after this one, or none. */
static const char *panel_after(const Layer *l, int panel, int later, int panels) {
    return panel + later < panels ? (const char *)l->weight + (panel + later) * panel_bytes(l) : NULL;
}

EXPORT void bough_linear(const Layer *l) {
    const int panels = (l->out_size + PANEL - 1) / PANEL, first = l->num_skipped, taken = panels - first;
    const int part = rows_of_part(l), parts = (l->num_rows + part - 1) / part;
#pragma omp parallel
    {
        const int num_threads = omp_get_num_threads(); /* panels are taken in turn: what this thread is likely to take */
        if (l->kind == LINEAR_BYTES) {
#pragma omp for schedule(static)
            for (int row = 0; row < l->num_rows; row++) to_bytes(l, row);
        }
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < parts * taken; item++) {
            const int begin = item / taken * part, end = begin + part, panel = first + item % taken;
            run_panel(l, begin, end < l->num_rows ? end : l->num_rows, panel, panel_after(l, panel, num_threads, panels));
        }
    }
}

void bough_linear_alone(const Layer *l) {
    const int panels = (l->out_size + PANEL - 1) / PANEL, part = rows_of_part(l);
    for (int begin = 0; begin < l->num_rows; begin += part)
        for (int panel = l->num_skipped; panel < panels; panel++) {
            const int end = begin + part < l->num_rows ? begin + part : l->num_rows;
            run_panel(l, begin, end, panel, panel_after(l, panel, 1, panels));
        }
}

#else

EXPORT int32_t bough_linear_kinds(void) { return 0; }

EXPORT void bough_linear(const Layer *l) { (void)l; }

void bough_linear_alone(const Layer *l) { (void)l; }

#endif
