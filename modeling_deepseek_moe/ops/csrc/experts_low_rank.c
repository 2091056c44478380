/* A layer's routed experts with an adapter's matrices next to their own, for a few tokens, one after the other:
   sum_k weight_k * down'_k(silu(gate'_k(x)) * up'_k(x)), where W' x = W x + scale * B (A x). In one call, as `dsm_experts`
   is: a token meets as many threads as there are, and what an adapter adds to an expert is made once for all its rows. */
#include "engine.h"

#define CHUNK 64 /* rows of gate and up of a task */

typedef struct {
    const Kernels *kernels;
    const Experts *given;
    const LowRank *gate_up, *down;
    int64_t hidden, width, active;
    const int64_t *experts;      /* [active], ascending */
    const float *weights;        /* of each */
    char *x, *x_low, *h, *h_low; /* packed for the weights and for A; an h for each expert */
    size_t x_stride, h_stride;
    float *low;                           /* a rank for each expert */
    float *to_gate_up, *values, *to_down; /* for each expert: what is added, SwiGLU, what is added */
    float *out;
} Token;

static Matrix part(const Token *t, const void *codes, const void *scale, int64_t rows, int64_t cols) {
    return (Matrix){codes, scale, rows, cols, t->given->dtype, t->given->scale_kind, NULL};
}

/* scale * B (A x) of expert `e`, for x packed; low: rank floats */
static void add_low(const Token *t, const LowRank *pair, int64_t e, const char *x, size_t stride, int64_t inputs,
                    int64_t outputs, float *low, float *out, float *workspace) {
    const int64_t rank = pair->rank, rows = rank * t->given->count;
    const Matrix a = {.data = pair->a, .rows = rows, .cols = inputs, .dtype = DSM_BF16};
    const Matrix b = {.data = pair->b, .rows = rows, .cols = outputs, .dtype = DSM_BF16};
    t->kernels->gemv(x, stride, 1, &a, e * rank, rank, low, rank, NULL);
    for (int64_t i = 0; i < rank; i++) low[i] *= pair->scale;
    t->kernels->gemv_transposed(low, &b, e * rank, rank, out, workspace);
}

/* SwiGLU of rows [r0, r0 + CHUNK) of the `s`th expert */
static void gate_and_up(const Token *t, int64_t s, int64_t r0) {
    float gate[CHUNK], up[CHUNK];
    const Kernels *k = t->kernels;
    const Expert *at = t->given->table + t->experts[s];
    const int64_t rows = dsm_min(CHUNK, t->width - r0);
    const Matrix g = part(t, at->gate, at->gate_scale, t->width, t->hidden);
    const Matrix u = part(t, at->up, at->up_scale, t->width, t->hidden);
    const void *next = r0 + rows < t->width ? dsm_row(&g, r0 + rows) : NULL;
    k->gemv(t->x, t->x_stride, 1, &g, r0, rows, gate, rows, dsm_row(&u, r0));
    k->gemv(t->x, t->x_stride, 1, &u, r0, rows, up, rows, next);
    if (t->gate_up->rank) {
        const float *add = t->to_gate_up + s * 2 * t->width + r0;
        for (int64_t r = 0; r < rows; r++) {
            gate[r] += add[r];
            up[r] += add[t->width + r];
        }
    }
    k->swiglu(gate, up, t->values + s * t->width + r0, rows);
}

static void pack_h(const Token *t, int64_t s, float *workspace) {
    const float *values = t->values + s * t->width;
    char *low = t->h_low + s * t->h_stride;
    t->kernels->pack(values, DSM_F32, t->width, t->given->dtype, t->h + s * t->h_stride);
    if (!t->down->rank) return;
    t->kernels->pack(values, DSM_F32, t->width, DSM_BF16, low);
    add_low(t, t->down, t->experts[s], low, t->h_stride, t->width, t->hidden, t->low + s * t->down->rank,
            t->to_down + s * t->hidden, workspace);
}

/* out columns [c0, c0 + columns), summed over ascending experts */
static void down(const Token *t, int64_t c0, int64_t columns) {
    float rows[DSM_MOST_GEMV_ROWS];
    for (int64_t c = 0; c < columns; c++) t->out[c0 + c] = 0;
    for (int64_t s = 0; s < t->active; s++) {
        const Expert *at = t->given->table + t->experts[s];
        const Matrix w = part(t, at->down, at->down_scale, t->hidden, t->width);
        const int last = s + 1 == t->active;
        const Expert *then = t->given->table + t->experts[last ? 0 : s + 1];
        const Matrix ahead = part(t, then->down, then->down_scale, t->hidden, t->width);
        const int64_t row = dsm_min(last ? c0 + columns : c0, t->hidden - columns);
        t->kernels->gemv(t->h + s * t->h_stride, t->h_stride, 1, &w, c0, columns, rows, columns, dsm_row(&ahead, row));
        const float *add = t->down->rank ? t->to_down + s * t->hidden + c0 : NULL;
        for (int64_t c = 0; c < columns; c++) t->out[c0 + c] += t->weights[s] * (rows[c] + (add ? add[c] : 0.0f));
    }
}

static void run(const Token *t, const void *x, int dtype, int threads, float *workspaces, int64_t workspace) {
    const int64_t chunks = (t->width + CHUNK - 1) / CHUNK, columns = dsm_gemv_rows(t->hidden, threads);
    t->kernels->pack(x, dtype, t->hidden, t->given->dtype, t->x);
    t->kernels->pack(x, dtype, t->hidden, DSM_BF16, t->x_low);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        if (t->gate_up->rank) {
#pragma omp for schedule(static)
            for (int64_t s = 0; s < t->active; s++)
                add_low(t, t->gate_up, t->experts[s], t->x_low, t->x_stride, t->hidden, 2 * t->width,
                        t->low + s * t->gate_up->rank, t->to_gate_up + s * 2 * t->width, workspaces + s * workspace);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < t->active * chunks; task++) gate_and_up(t, task / chunks, task % chunks * CHUNK);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < t->active; s++) pack_h(t, s, workspaces + s * workspace);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < t->hidden; c += columns) down(t, c, dsm_min(columns, t->hidden - c));
        dsm_restore_mode(mode);
    }
}

/* A token's experts in ascending order, with their weights; those that are left out, or served elsewhere, are not among
   them. Returns how many. */
static int64_t sort_experts(const Experts *given, const int64_t *indices, const float *weights, int64_t top_k,
                            int64_t *experts, float *own) {
    int64_t active = 0;
    for (int64_t i = 0; i < top_k; i++) {
        const int64_t index = indices[i];
        if (index < 0 || index >= given->count || !given->table[index].gate) continue;
        int64_t place = active++;
        for (; place && experts[place - 1] > index; place--) {
            experts[place] = experts[place - 1];
            own[place] = own[place - 1];
        }
        experts[place] = index;
        own[place] = weights[i];
    }
    return active;
}

/* y [tokens, hidden] of `dtype` from x of the same; indices and weights [tokens, top_k]. */
DSM_API int dsm_experts_low_rank(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden,
                                 const int64_t *indices, const float *weights, int64_t top_k, const Experts *given,
                                 const LowRank *gate_up, const LowRank *down, void *y) {
    const Kernels *k = dsm_kernels(isa, dtype);
    const int64_t width = given->width, rank = dsm_max(gate_up->rank, down->rank);
    const int64_t workspace = (dsm_max(2 * width, hidden) + DSM_BLOCK - 1) / DSM_BLOCK * DSM_BLOCK;
    if (tokens < 0 || hidden < 1 || width < 1 || top_k < 1 || given->count < 1 || gate_up->rank < 0 || down->rank < 0)
        return DSM_BAD_ARGUMENT;
    Token t = {.kernels = k, .given = given, .gate_up = gate_up, .down = down, .hidden = hidden, .width = width};
    t.x_stride = dsm_packed_stride(k, hidden, given->dtype); /* no less than for A */
    t.h_stride = dsm_packed_stride(k, width, given->dtype);
    const size_t row = (size_t)hidden * dsm_itemsize(dtype), packed = 2 * (t.x_stride + top_k * t.h_stride);
    const int64_t each = 3 * width + hidden + workspace + (rank + 15) / 16 * 16;
    float *floats = dsm_borrow(sizeof(float) * (hidden + top_k * each)), *own = dsm_alloc(sizeof(float) * top_k);
    int64_t *experts = dsm_alloc(sizeof(int64_t) * top_k);
    t.x = dsm_borrow(packed);
    const int failed = !floats || !own || !experts || !t.x;
    if (!failed) {
        t.x_low = t.x + t.x_stride;
        t.h = t.x_low + t.x_stride;
        t.h_low = t.h + top_k * t.h_stride;
        float *workspaces = floats; /* first: they are to be aligned */
        t.out = workspaces + top_k * workspace;
        t.to_gate_up = t.out + hidden;
        t.values = t.to_gate_up + top_k * 2 * width;
        t.to_down = t.values + top_k * width;
        t.low = t.to_down + top_k * hidden;
        t.experts = experts;
        t.weights = own;
        const int64_t bytes = 3 * top_k * dsm_row_bytes(given->dtype, hidden * width);
        const uint64_t caller = dsm_exact_mode();
        for (int64_t i = 0; i < tokens; i++) {
            t.active = sort_experts(given, indices + i * top_k, weights + i * top_k, top_k, experts, own);
            run(&t, (const char *)x + i * row, dtype, dsm_threads(threads, bytes), workspaces, workspace);
            k->write(t.out, NULL, hidden, (char *)y + i * row, dtype);
        }
        dsm_restore_mode(caller);
    }
    dsm_give_back(floats);
    dsm_give_back(t.x);
    free(own);
    free(experts);
    return failed ? DSM_NO_MEMORY : DSM_OK;
}
