/* A layer's routed experts: sum_k weight_k * down_k(silu(gate_k(x)) * up_k(x)), in one call.

   Experts are given by address, so stacked, mapped and streamed ones are the same to it. One whose address is zero is
   left out: a caller that brings experts in bit by bit calls again with the next ones, in ascending order, and gets
   the bits that one call with all of them gives, since each output is summed over ascending experts in fp32.

   An adapter's matrices are met next to an expert's own (experts_low_rank.h). */
#include "experts_low_rank.h"
#include "work_queue.h"

#define CHUNK 64 /* rows of gate and up of a task, or a multiple: whole groups of every packing */
#define MANY_TOKENS 512
#define DOWN_BYTES (128 << 10) /* of one expert in a task of `down`, at least, for few tokens */

/* an expert that tokens were sent to */
typedef struct {
    Matrix gate, up, down;
    int64_t first, tokens; /* its slots in `order` */
    int64_t packed, input; /* where they begin among the packed rows of h, and of x */
    int64_t index;         /* among all experts */
} Share;

typedef struct {
    const Kernels *kernels;
    Share *experts;
    int64_t active, hidden, width, chunk;
    int64_t *order; /* slots (token * top_k + k) sorted by expert */
    int64_t top_k;
    const float *weights;
    /* packed, of each slot in `order`, an expert's in whole groups: inputs (an only token's once for all), SwiGLU outputs */
    char *x, *h;
    size_t x_stride, h_stride;
    float *out;
    void *y;                /* [tokens, hidden] of `dtype`, NULL: out is what is wanted */
    int64_t tokens, placed; /* placed: slots in `order` */
    int dtype, weight_dtype;
    const Adapted *adapted; /* or NULL */
} Layer;

static int is_many(const Layer *layer, const Share *e) {
    return dsm_are_many(layer->kernels, e->tokens, layer->weight_dtype);
}
static int64_t packed_rows(const Layer *layer) {
    const Share *last = layer->experts + layer->active - 1;
    return last->packed + dsm_packed_tokens(layer->kernels, last->tokens);
}

/* the expert of a slot; NULL where it is left out, or served elsewhere */
static const Expert *expert_of(const Experts *given, int64_t index) {
    return index >= 0 && index < given->count && given->table[index].gate ? given->table + index : NULL;
}

/* Buckets the slots by expert. Returns the number of active experts, -1 without memory. */
static int64_t sort_slots(Layer *layer, const int64_t *indices, int64_t slots, const Experts *given) {
    int64_t *starts = calloc((size_t)given->count + 1, sizeof *starts), active = 0, placed = 0, packed = 0;
    if (!starts) return -1;
    for (int64_t s = 0; s < slots; s++)
        if (expert_of(given, indices[s])) starts[indices[s] + 1]++;
    for (int64_t e = 0; e < given->count; e++) {
        int64_t tokens = starts[e + 1];
        if (tokens) {
            const Expert *at = given->table + e;
            const int64_t d = layer->hidden, i = given->width;
            layer->experts[active++] = (Share){
                {at->gate, at->gate_scale, i, d, given->dtype, given->scale_kind, NULL},
                {at->up, at->up_scale, i, d, given->dtype, given->scale_kind, NULL},
                {at->down, at->down_scale, d, i, given->dtype, given->scale_kind, NULL},
                placed,
                tokens,
                packed,
                packed,
                e,
            };
            packed += dsm_packed_tokens(layer->kernels, tokens);
        }
        starts[e + 1] = placed;
        placed += tokens;
    }
    /* starts[e + 1] is now where expert e begins, and moves on as its slots are placed */
    for (int64_t s = 0; s < slots; s++)
        if (expert_of(given, indices[s])) layer->order[starts[indices[s] + 1]++] = s;
    /* an only token that no expert has twice is packed once, with the first of them */
    for (int64_t i = 0; layer->tokens == 1 && placed == active && i < active; i++) layer->experts[i].input = 0;
    free(starts);
    layer->placed = placed;
    return active;
}

/* A product's rows [r0, r0 + rows) for one expert's tokens. Returns how far its results' rows lie apart. */
static int64_t multiply_chunk(const Kernels *k, int many, const char *x, size_t stride, int64_t tokens,
                              const Matrix *w, int64_t r0, int64_t rows, const void *next, float *out, float *panel,
                              void *scratch) {
    PrefetchStream none = {0};
    if (!many) {
        k->gemv(x, stride, tokens, w, r0, rows, out, rows, next);
    } else if (rows <= k->panels * k->panel_columns) {
        k->gemm(x, stride, tokens, w, r0, rows, out, scratch, &none);
        return dsm_panels(k, rows);
    } else {
        for (int64_t c = 0; c < rows; c += k->panel_columns) {
            const int64_t n = dsm_min(k->panel_columns, rows - c);
            k->gemm(x, stride, tokens, w, r0 + c, n, panel, scratch, &none);
            for (int64_t t = 0; t < tokens; t++)
                memcpy(out + t * rows + c, panel + t * k->panel_columns, sizeof(float) * n);
        }
    }
    return rows;
}

/* the expert of a place in `order` */
static const Share *share_of(const Layer *layer, int64_t place) {
    const Share *e = layer->experts;
    while (place >= e->first + e->tokens) e++;
    return e;
}
/* called by all threads: what A makes of each slot's x */
static void make_low_of_x(const Layer *layer, const void *x) {
    const Adapted *a = layer->adapted;
    const size_t row = layer->hidden * dsm_itemsize(layer->dtype);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < layer->tokens; t++)
        layer->kernels->pack((const char *)x + t * row, layer->dtype, layer->hidden, DSM_BF16, a->x + t * a->x_stride);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < layer->placed; i++)
        low_of(layer->kernels, a->gate_up, a->experts, share_of(layer, i)->index,
               a->x + layer->order[i] / layer->top_k * a->x_stride, a->x_stride, layer->hidden,
               a->to_gate_up + i * a->gate_up->rank);
}
/* and of its h */
static void make_low_of_h(const Layer *layer) {
    const Adapted *a = layer->adapted;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < layer->placed; i++)
        low_of(layer->kernels, a->down, a->experts, share_of(layer, i)->index, a->h + i * a->h_stride, a->h_stride,
               layer->width, a->to_down + i * a->down->rank);
}

/* rows [r0, r0 + rows) of one h, packed: a group of 64 at a time, since whole blocks are packed and the next is another task's */
static void pack_rows(const Kernels *k, const float *values, int64_t rows, int dtype, char *h, int64_t r0) {
    const int bytes = dsm_packed_bytes(k, dtype);
    for (int64_t r = 0; r < rows; r += CHUNK) {
        char packed[DSM_BLOCK * 4] __attribute__((aligned(64)));
        k->pack(values + r, DSM_F32, dsm_min(CHUNK, rows - r), dtype, packed);
        memcpy(h + (r0 + r) * bytes, packed, CHUNK * bytes);
    }
}

/* h rows [r0, r0 + chunk) of one expert's tokens [t0, t0 + tokens) */
static void gate_and_up(const Layer *layer, const Share *e, int64_t r0, int64_t t0, int64_t tokens, float *gate,
                        float *up, float *panel, void *scratch) {
    const Kernels *k = layer->kernels;
    const int64_t rows = dsm_min(layer->chunk, layer->width - r0), step = k->panel_tokens;
    const int many = is_many(layer, e), dtype = layer->weight_dtype;
    const char *x = layer->x + (e->input + t0) * layer->x_stride;
    char *h = layer->h + (e->packed + t0) * layer->h_stride;
    const int last = r0 + rows == layer->width, end = last && e + 1 == layer->experts + layer->active;
    const void *next = last ? end ? NULL : e[1].gate.data : dsm_row(&e->gate, r0 + rows);
    multiply_chunk(k, many, x, layer->x_stride, tokens, &e->gate, r0, rows, dsm_row(&e->up, r0), gate, panel, scratch);
    const int64_t ld = multiply_chunk(k, many, x, layer->x_stride, tokens, &e->up, r0, rows, next, up, panel, scratch);
    const Adapted *a = layer->adapted;
    for (int64_t t = 0; a && a->gate_up->rank && t < tokens; t++) {
        const float *low = a->to_gate_up + (e->first + t0 + t) * a->gate_up->rank;
        add_low(k, a->gate_up, e->index, 2 * layer->width, low, r0, rows, gate + t * ld);
        add_low(k, a->gate_up, e->index, 2 * layer->width, low, layer->width + r0, rows, up + t * ld);
    }
    for (int64_t t = 0; t < tokens; t += step) {
        const int64_t n = dsm_min(step, tokens - t);
        const void *values[DSM_GROUP_TOKENS];
        for (int64_t i = 0; i < n; i++) {
            values[i] = gate + (t + i) * ld;
            k->swiglu(gate + (t + i) * ld, up + (t + i) * ld, gate + (t + i) * ld, rows);
        }
        if (many && k->pack_interleaved)
            k->pack_interleaved(values, n, DSM_F32, rows, dtype, h + t * layer->h_stride, 0, r0);
        else
            for (int64_t i = 0; i < n; i++) pack_rows(k, values[i], rows, dtype, h + (t + i) * layer->h_stride, r0);
        for (int64_t i = 0; a && a->down->rank && i < n; i++)
            pack_rows(k, values[i], rows, DSM_BF16, a->h + (e->first + t0 + t + i) * a->h_stride, r0);
    }
}

/* out columns [c0, c0 + columns) of every expert's tokens, and y's of all tokens */
static void down(const Layer *layer, int64_t c0, int64_t columns, float *part, void *scratch) {
    const Kernels *k = layer->kernels;
    const Adapted *a = layer->adapted;
    PrefetchStream none = {0};
    for (int64_t i = 0; i < layer->active; i++) {
        const Share *e = layer->experts + i;
        const int few = !is_many(layer, e);
        for (int64_t t0 = 0; t0 < e->tokens; t0 += MANY_TOKENS) {
            const int64_t tokens = dsm_min(MANY_TOKENS, e->tokens - t0),
                          step = few ? columns : k->panels * k->panel_columns;
            const char *h = layer->h + (e->packed + t0) * layer->h_stride;
            for (int64_t c = c0; c < c0 + columns; c += step) {
                const int64_t n = dsm_min(step, c0 + columns - c);
                const int64_t ld = few ? n : dsm_panels(k, n);
                const void *next =
                    i + 1 < layer->active ? dsm_row(&e[1].down, c) : dsm_row(&layer->experts->down, c + n);
                if (few) k->gemv(h, layer->h_stride, tokens, &e->down, c, n, part, ld, next);
                else k->gemm(h, layer->h_stride, tokens, &e->down, c, n, part, scratch, &none);
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t slot = layer->order[e->first + t0 + t];
                    float *to = layer->out + slot / layer->top_k * layer->hidden + c;
                    const float weight = layer->weights[slot];
                    float *from = part + t * ld;
                    if (a && a->down->rank)
                        add_low(k, a->down, e->index, layer->hidden, a->to_down + (e->first + t0 + t) * a->down->rank,
                                c, n, from);
                    for (int64_t r = 0; r < n; r++) to[r] += weight * from[r];
                }
            }
        }
    }
    for (int64_t t = 0; layer->y && t < layer->tokens; t++) {
        const int64_t at = t * layer->hidden + c0;
        k->write(layer->out + at, NULL, columns, (char *)layer->y + at * dsm_itemsize(layer->dtype), layer->dtype);
    }
}

/* tokens t .. of one group */
static void pack_tokens(const Layer *layer, const void *x, const Share *e, int64_t t) {
    const Kernels *k = layer->kernels;
    const int64_t tokens = dsm_min(k->panel_tokens, e->tokens - t);
    const size_t row = layer->hidden * dsm_itemsize(layer->dtype);
    const void *rows[DSM_GROUP_TOKENS];
    for (int64_t i = 0; i < tokens; i++)
        rows[i] = (const char *)x + layer->order[e->first + t + i] / layer->top_k * row;
    dsm_pack(k, is_many(layer, e), rows, tokens, layer->dtype, layer->hidden, layer->weight_dtype,
             layer->x + e->input * layer->x_stride, layer->x_stride, t);
}

/* tasks of `gate_and_up` that one expert makes */
static int64_t tasks_of(const Layer *layer, const Share *e) {
    return (layer->width + layer->chunk - 1) / layer->chunk * ((e->tokens + MANY_TOKENS - 1) / MANY_TOKENS);
}

/* the `task`th of all experts' chunks of gate and up; buffer: gate, up and a panel, `half` floats each */
static void gate_and_up_task(const Layer *layer, int64_t task, float *buffer, int64_t half, void *scratch) {
    const Share *e = layer->experts;
    for (; task >= tasks_of(layer, e); e++) task -= tasks_of(layer, e);
    const int64_t chunks = (layer->width + layer->chunk - 1) / layer->chunk, t0 = task / chunks * MANY_TOKENS;
    gate_and_up(layer, e, task % chunks * layer->chunk, t0, dsm_min(MANY_TOKENS, e->tokens - t0), buffer,
                buffer + half, buffer + 2 * half, scratch);
}

/* Columns of a task of `down`: a few panels keep an expert's h in the cache, and short runs of rows are read slowly, an
   expert's at a time; but every thread needs some tasks. */
static int64_t columns_of_down(const Layer *layer, int many, int threads) {
    int64_t columns = many ? layer->kernels->panel_columns : dsm_gemv_rows(layer->hidden, threads);
    const int64_t row = dsm_row_bytes(layer->weight_dtype, layer->width);
    while (columns < DSM_MOST_GEMV_ROWS && (many || columns * row < DOWN_BYTES) &&
           layer->hidden / (2 * columns) >= 4 * threads)
        columns *= 2;
    return columns;
}

static int run(Layer *layer, const void *x, int threads) {
    const Kernels *k = layer->kernels;
    int64_t most = 0, tasks = 0;
    int failed = 0;
    for (int64_t i = 0; i < layer->active; i++) most = dsm_max(most, layer->experts[i].tokens);
    const int many = dsm_are_many(k, most, layer->weight_dtype);
    const int64_t all = layer->width * layer->active;
    layer->chunk = dsm_max(CHUNK, many ? dsm_panel_rows(k, all, threads) : dsm_gemv_rows(all, threads));
    for (int64_t i = 0; i < layer->active; i++) tasks += tasks_of(layer, layer->experts + i);
    const int64_t weights = layer->active * 3 * dsm_row_bytes(layer->weight_dtype, layer->hidden * layer->width);
    threads = dsm_threads(threads, weights * (many ? 1 + most / 16 : 1));
    const int64_t columns = columns_of_down(layer, many, threads);
    const int64_t down_tasks = (layer->hidden + columns - 1) / columns;
    /* gate and up of a chunk, and a panel next to them where one is multiplied */
    const int64_t room = dsm_packed_tokens(k, dsm_min(most, MANY_TOKENS)), half = room * layer->chunk;
    const int64_t floats = dsm_max((many ? 3 : 2) * half, room * columns);
    WorkQueue *queues = dsm_work_queues(threads, tasks), *down_queues = dsm_work_queues(threads, down_tasks);
    if (!queues || !down_queues) {
        free(queues);
        free(down_queues);
        return DSM_NO_MEMORY;
    }
    const uint64_t caller = dsm_exact_mode();
    for (int64_t i = 0; !many && i < layer->active; i++) /* less work than a barrier */
        for (int64_t t = 0; (!i || layer->experts[i].input) && t < layer->experts[i].tokens; t += k->panel_tokens)
            pack_tokens(layer, x, layer->experts + i, t);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        float *buffer = dsm_alloc(sizeof(float) * floats);
        void *scratch = dsm_alloc(k->scratch_bytes);
        if (!buffer || !scratch) {
#pragma omp atomic write
            failed = 1;
        }
        if (many) {
            for (int64_t i = 0; i < layer->active; i++) {
                const Share *e = layer->experts + i;
#pragma omp for schedule(static) nowait
                for (int64_t t = 0; t < e->tokens; t += k->panel_tokens) pack_tokens(layer, x, e, t);
            }
#pragma omp barrier
        }
        if (layer->adapted && layer->adapted->gate_up->rank) make_low_of_x(layer, x);
        for (int64_t task; (task = dsm_next_task(queues, threads, dsm_thread_id())) >= 0;)
            if (!failed) gate_and_up_task(layer, task, buffer, half, scratch);
#pragma omp barrier
        if (layer->adapted && layer->adapted->down->rank) make_low_of_h(layer);
        for (int64_t task; (task = dsm_next_task(down_queues, threads, dsm_thread_id())) >= 0;)
            if (!failed)
                down(layer, task * columns, dsm_min(columns, layer->hidden - task * columns), buffer, scratch);
        free(buffer);
        free(scratch);
        dsm_restore_mode(mode);
    }
    dsm_restore_mode(caller);
    free(queues);
    free(down_queues);
    return failed ? DSM_NO_MEMORY : DSM_OK;
}

static int compute(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden,
                   const int64_t *indices, const float *weights, int64_t top_k, const Experts *given, Adapted *adapted,
                   float *out, void *y) {
    const Kernels *kernels = dsm_kernels(isa, dtype);
    const int64_t width = given->width;
    const int64_t slots = tokens * top_k;
    int result = DSM_NO_MEMORY;
    if (tokens < 0 || hidden < 1 || width < 1 || top_k < 1 || given->count < 1 || !out == !y) return DSM_BAD_ARGUMENT;
    if (slots == 0) return DSM_OK;
    Layer layer = {
        .kernels = kernels,
        .hidden = hidden,
        .width = width,
        .top_k = top_k,
        .weights = weights,
        .x_stride = dsm_packed_stride(kernels, hidden, given->dtype),
        .h_stride = dsm_packed_stride(kernels, width, given->dtype),
        .out = out ? out : dsm_borrow(sizeof(float) * tokens * hidden),
        .y = y,
        .tokens = tokens,
        .dtype = dtype,
        .weight_dtype = given->dtype,
        .adapted = adapted,
        .active = -1,
    };
    layer.order = dsm_alloc(sizeof *layer.order * slots);
    layer.experts = dsm_alloc(sizeof *layer.experts * dsm_min(given->count, slots));
    if (layer.order && layer.experts && layer.out) layer.active = sort_slots(&layer, indices, slots, given);
    if (layer.active == 0) {
        if (y) memset(y, 0, tokens * hidden * dsm_itemsize(dtype));
        result = DSM_OK;
    }
    if (layer.active > 0) {
        layer.x = dsm_borrow(packed_rows(&layer) * layer.x_stride);
        layer.h = dsm_borrow(packed_rows(&layer) * layer.h_stride);
    }
    if (layer.active >= 0 && y) memset(layer.out, 0, sizeof(float) * tokens * hidden);
    if (layer.x && layer.h && (!adapted || make_adapted(adapted, kernels, tokens, slots, hidden, width))) {
        /* a ragged width's last block has no values to pack after them */
        for (int64_t i = 0; i < layer.active && (width % CHUNK || width / CHUNK % 2); i++) {
            const Share *e = layer.experts + i;
            const int64_t rows = is_many(&layer, e) ? dsm_packed_tokens(kernels, e->tokens) : e->tokens;
            memset(layer.h + e->packed * layer.h_stride, 0, rows * layer.h_stride);
        }
        result = run(&layer, x, threads);
    }
    if (y) dsm_give_back(layer.out);
    free(layer.order);
    free(layer.experts);
    dsm_give_back(layer.x);
    dsm_give_back(layer.h);
    if (adapted) free_adapted(adapted);
    return result;
}

/* out [tokens, hidden] fp32 += the experts' weighted outputs, or, where out is NULL, y [tokens, hidden] of `dtype` = them.

   x [tokens, hidden] of `dtype`; indices and weights [tokens, top_k]. */
DSM_API int dsm_experts(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden,
                        const int64_t *indices, const float *weights, int64_t top_k, const Experts *given, float *out,
                        void *y) {
    return compute(isa, threads, dtype, x, tokens, hidden, indices, weights, top_k, given, NULL, out, y);
}

/* y of the experts with an adapter's matrices next to their own */
DSM_API int dsm_experts_low_rank(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden,
                                 const int64_t *indices, const float *weights, int64_t top_k, const Experts *given,
                                 const LowRank *gate_up, const LowRank *down, void *y) {
    Adapted adapted = {.gate_up = gate_up, .down = down, .experts = given->count};
    if (gate_up->rank < 0 || down->rank < 0) return DSM_BAD_ARGUMENT;
    return compute(isa, threads, dtype, x, tokens, hidden, indices, weights, top_k, given, &adapted, NULL, y);
}
