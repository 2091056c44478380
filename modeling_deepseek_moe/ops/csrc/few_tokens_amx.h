/* FP8 for one token group; part of `kernels_amx.c`.

   A block of columns of 16 weight rows is decoded while the one before it is multiplied, so that what is decoded stays in
   the first cache. The processor fetches ahead of many readers at once, if each has a page of its own: so up to 64 rows are
   taken in turns of 16 that lie apart, where possible in other places of their pages too, since those that lie alike share
   a few lines of the first cache. */

/* turns of `count` rows, up to a panel: 1, 2 or 4 */
DSM_INLINE int64_t turns_of(int64_t count) { return count <= TILE ? 1 : count <= 2 * TILE ? 2 : PANEL / TILE; }
DSM_INLINE int64_t row_of(int64_t turn, int64_t i, int64_t turns) { return i * turns + ((i + turn) & (turns - 1)); }
/* which of turns x 16 places a row has: row_of(slot / 16, slot % 16) is the row */
DSM_INLINE int64_t slot_of(int64_t row, int64_t turns) {
    const int64_t i = row / turns;
    return ((row - i) & (turns - 1)) * TILE + i;
}

typedef struct {
    const uint8_t *from; /* of the panel's first row */
    char *to;
    int64_t turn, turns, count, columns, pitch; /* count: rows of the panel, 0: there is no block */
    const uint8_t *next;                        /* of the first row of the panel that follows */
} Block;

/* What a reader wants READ_AHEAD bytes after a block of columns: after its row comes its row of the next turn. */
DSM_INLINE const char *wanted(const Block *block, int64_t row, int64_t i, const uint8_t *from) {
    const uint8_t *ahead = from + READ_AHEAD;
    if (block->columns > READ_AHEAD) return (const char *)ahead;
    if (block->turn + 1 < block->turns) ahead += (row_of(block->turn + 1, i, block->turns) - row - 1) * block->pitch;
    else ahead = block->next + row_of(0, i, block->turns) * block->pitch + READ_AHEAD - block->columns;
    return (const char *)ahead;
}

DSM_INLINE void decode_some(Normal n, const Block *block, int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; i++) {
        const int64_t row = row_of(block->turn, i, block->turns);
        const uint8_t *from = block->from + row * block->pitch;
        if (row >= block->count) break;
        const char *ahead = wanted(block, row, i, from);
        _mm_prefetch(ahead,
                     _MM_HINT_T1); /* far into the second cache, near into the first: 3 % more than either alone */
        _mm_prefetch(ahead + 64, _MM_HINT_T1);
        _mm_prefetch((const char *)from + DSM_BLOCK, _MM_HINT_T0);
        _mm_prefetch((const char *)from + DSM_BLOCK + 64, _MM_HINT_T0);
        if (block->columns >= DSM_BLOCK) decode_block(n, from, block->to + i * 64);
        else decode_rest(n, from, block->columns, block->to + i * 64);
    }
}
/* Product 0 is that of a decoded block; the next one is decoded between its steps, which wait for each other. */
DSM_INLINE void multiply_decoded(Normal n, const char *tiles, const char *x, int64_t columns, const Block *next) {
    _tile_zero(0);
    _tile_loadd(4, tiles, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    decode_some(n, next, 0, 4);
    _tile_loadd(5, tiles + TILE_BYTES, 64);
    _tile_loadd(7, x + TILE_BYTES, 64);
    _tile_dpbf16ps(0, 5, 7);
    decode_some(n, next, 4, 8);
    if (columns > 64) {
        _tile_loadd(4, tiles + 2 * TILE_BYTES, 64);
        _tile_loadd(6, x + 2 * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    decode_some(n, next, 8, 12);
    if (columns > 64) {
        _tile_loadd(5, tiles + 3 * TILE_BYTES, 64);
        _tile_loadd(7, x + 3 * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 5, 7);
    }
    decode_some(n, next, 12, 16);
}
/* sums[slot][16 tokens] of rows [first, first + count) of one panel, whose scales are those of the first. A product is
   added to the sums a block later: what a tile has stored cannot be read at once. */
static void multiply_group(const Matrix *w, int64_t first, int64_t count, const char *x, float *sums, char *scratch,
                           const void *after) {
    const Normal n = normal();
    const float *scales = dsm_block_scale(w, first, 0);
    const uint8_t *data = (const uint8_t *)w->data + first * w->cols;
    const int64_t turns = turns_of(count);
    float products[2][TILE_FLOATS] __attribute__((aligned(64)));
    float *to = NULL, scale = 0;
    int begun = 0, half = 0;
    Block next = {data, scratch, 0, turns, count, w->cols, w->cols, after};
    decode_some(n, &next, 0, TILE);
    for (int64_t turn = 0; turn < turns; turn++)
        for (int64_t k = 0; k < w->cols; k += DSM_BLOCK, half = !half) {
            const char *tiles = next.to;
            next.to = scratch + (half ? 0 : BLOCK_BYTES);
            next.from += DSM_BLOCK, next.columns -= DSM_BLOCK;
            if (next.columns <= 0) next.from = data, next.columns = w->cols, next.turn = turn + 1;
            if (next.turn == turns) next.count = 0;
            MEMORY_WRITTEN;
            multiply_decoded(n, tiles, x + k / 2 * 64, w->cols - k, &next);
            _tile_stored(0, products[half], 64);
            if (to) add_products(to, products[!half], TILE_FLOATS, scale, begun);
            to = sums + turn * TILE_FLOATS, scale = scales[k / DSM_BLOCK], begun = k > 0;
        }
    MEMORY_WRITTEN;
    if (to) add_products(to, products[!half], TILE_FLOATS, scale, begun);
}
