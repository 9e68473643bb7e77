/* How a unit of work is walked, whatever the arithmetic. Include it where Tile, Rows, read_tile and run_tile are
 * defined. */

/* One unit's chunk: all its rows, a tile of them at a time. A row is a (query token, head of the group). */
INLINE void run_chunk(const Args *args, const int32_t *unit, const Tile *tile, Rows *rows, int chunk, int head,
                      const int is_bf16) {
    const int dim = args->dim, group = args->num_heads / args->num_kv_heads, first = chunk * CHUNK;
    const int num_rows = (unit[ROWS_END] - unit[ROWS_BEGIN]) * group;
    const int is_first = unit[IS_FIRST] && chunk == unit[CHUNK_BEGIN];
    int row = unit[ROWS_BEGIN], of_group = 0;
    for (int begin = 0; begin < num_rows; begin += ROW_TILE) {
        const int here = num_rows - begin < ROW_TILE ? num_rows - begin : ROW_TILE;
        Part parts[ROW_TILE];
        int count = 0;
        for (int r = 0; r < here; r++) {
            const int token = args->rows[row];
            const int left = args->positions[token] + 1 - first;
            parts[r].at = (ptrdiff_t)token * args->num_heads + (ptrdiff_t)head * group + of_group;
            parts[r].valid = left < CHUNK ? left : CHUNK;
            count = parts[r].valid > count ? parts[r].valid : count;
            if (++of_group == group) {
                of_group = 0;
                row++;
            }
        }
        if (count <= 0) continue;
        run_tile(args, tile, rows, parts, count, here, is_first, is_bf16);
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

/* The heads [begin_head, end_head) of a unit, one after another. */
INLINE void run_unit_as(const Args *args, const int32_t *unit, int begin_head, int end_head, const int is_bf16,
                        const int kind) {
    Tile tile;
    Rows rows;
    int last = 0; /* position of the unit's last row */
    for (int i = unit[ROWS_BEGIN]; i < unit[ROWS_END]; i++) {
        const int position = args->positions[args->rows[i]];
        last = position > last ? position : last;
    }
    const int begin = unit[CHUNK_BEGIN] * CHUNK, chunks_end = unit[CHUNK_END] * CHUNK;
    Span span = {args->pages + unit[PAGES_AT], begin, last + 1 < chunks_end ? last + 1 : chunks_end, begin_head, 0};
    prefetch(args, &span, begin, AHEAD, begin_head, kind);
    for (int head = begin_head; head < end_head; head++) {
        span.head = head;
        span.then_next = head + 1 < end_head;
        for (int chunk = unit[CHUNK_BEGIN]; chunk < unit[CHUNK_END]; chunk++) {
            const int left = span.end - chunk * CHUNK;
            read_tile(&tile, args, &span, chunk * CHUNK, left < CHUNK ? left : CHUNK, kind);
            run_chunk(args, unit, &tile, &rows, chunk, head, is_bf16);
        }
        if (unit[IS_LAST]) finish(args, unit, head, is_bf16);
    }
}
