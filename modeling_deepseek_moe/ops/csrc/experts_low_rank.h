/* Adapters of routed experts: W x + scale * B (A x) in place of W x, for gate and up, which share A, and for down. Part of
   `experts.c`. What A makes of a slot (a token at one of its experts) is a few numbers, found between the steps of the layer; what
   B makes of them is added where a step has its rows. */
#ifndef DSM_EXPERTS_LOW_RANK_H
#define DSM_EXPERTS_LOW_RANK_H

#include "engine.h"

typedef struct {
    const LowRank *gate_up, *down; /* without a rank: nothing */
    int64_t experts;
    /* packed for A: x of each token, h of each slot in `order` */
    char *x, *h;
    size_t x_stride, h_stride;
    float *to_gate_up, *to_down; /* what A makes of them, times the scale, for each slot in `order` */
} Adapted;

/* the ranks of a slot: scale * A x, for x packed */
DSM_INLINE void low_of(const Kernels *k, const LowRank *pair, int64_t experts, int64_t expert, const char *x,
                       size_t stride, int64_t inputs, float *low) {
    const Matrix a = {.data = pair->a, .rows = pair->rank * experts, .cols = inputs, .dtype = DSM_BF16};
    k->gemv(x, stride, 1, &a, expert * pair->rank, pair->rank, low, pair->rank, NULL);
    for (int64_t i = 0; i < pair->rank; i++) low[i] *= pair->scale;
}

/* out[i] += B low of an expert's outputs first + i < first + n; B is turned, [experts, rank, outputs] */
DSM_INLINE void add_low(const Kernels *k, const LowRank *pair, int64_t expert, int64_t outputs, const float *low,
                        int64_t first, int64_t n, float *out) {
    const uint16_t *b = (const uint16_t *)pair->b + expert * pair->rank * outputs + first;
    k->add_rows(low, pair->rank, b, outputs, n, out);
}

DSM_INLINE void free_adapted(Adapted *a) {
    dsm_give_back(a->x);
    dsm_give_back(a->h);
    dsm_give_back(a->to_gate_up);
}
/* whether there is memory for `slots` slots of `tokens` tokens */
DSM_INLINE int make_adapted(Adapted *a, const Kernels *k, int64_t tokens, int64_t slots, int64_t hidden,
                            int64_t width) {
    const int64_t ranks = a->gate_up->rank + a->down->rank;
    a->x_stride = dsm_packed_stride(k, hidden, DSM_BF16);
    a->h_stride = dsm_packed_stride(k, width, DSM_BF16);
    a->x = dsm_borrow(a->gate_up->rank ? tokens * a->x_stride : 0);
    a->h = dsm_borrow(a->down->rank ? slots * a->h_stride : 0);
    a->to_gate_up = dsm_borrow(sizeof(float) * slots * ranks);
    if (!a->x || !a->h || !a->to_gate_up) return 0;
    a->to_down = a->to_gate_up + slots * a->gate_up->rank;
    /* a ragged width's last block has no values to pack after them */
    if (a->down->rank && width % DSM_BLOCK) memset(a->h, 0, slots * a->h_stride);
    return 1;
}

#endif
