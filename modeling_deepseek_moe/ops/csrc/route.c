/* Which experts each token goes to, and with which weight: see `ops/routing/reference.py`, which is the definition. */
#include "engine.h"

#include <math.h>

#define MOST_EXPERTS 4096 /* `ops/routing/cpu.py` says so too */

/* whether a comes before b: the larger, and NaN before all */
DSM_INLINE int before(float a, float b) { return a > b || (a != a && b == b); }

/* the place of the largest of `n` values that `taken` does not mark, which it then does; the first of equals */
static int64_t take_largest(const float *values, int64_t n, uint8_t *taken) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || before(values[i], values[best]))) best = i;
    taken[best] = 1;
    return best;
}

static void score(const Routing *r, int64_t experts, const float *logits, float *scores) {
    if (!r->softmax) {
        for (int64_t e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
        return;
    }
    float most = logits[0], sum = 0.0f;
    for (int64_t e = 1; e < experts; e++) most = before(logits[e], most) ? logits[e] : most;
    for (int64_t e = 0; e < experts; e++) sum += scores[e] = expf(logits[e] - most);
    for (int64_t e = 0; e < experts; e++) scores[e] /= sum;
}

/* `taken` marks the experts of all groups but the best on return */
static void drop_groups(const Routing *r, int64_t experts, const float *choice, uint8_t *taken, float *group_scores,
                        uint8_t *kept) {
    const int64_t size = experts / r->n_group;
    for (int64_t g = 0; g < r->n_group; g++) {
        const float *own = choice + g * size;
        uint8_t *marks = taken + g * size;
        const int64_t best = take_largest(own, size, marks);
        group_scores[g] = own[best];
        if (r->group_score_top2) {
            const int64_t second = take_largest(own, size, marks);
            group_scores[g] += own[second];
        }
    }
    memset(kept, 0, (size_t)r->n_group);
    memset(taken, 1, (size_t)experts);
    for (int64_t i = 0; i < r->topk_group; i++)
        memset(taken + take_largest(group_scores, r->n_group, kept) * size, 0, (size_t)size);
}

static void route(const Routing *r, int64_t experts, const float *bias, const float *logits, float *weights,
                  int64_t *indices) {
    float scores[MOST_EXPERTS], choice[MOST_EXPERTS], group_scores[MOST_EXPERTS];
    uint8_t taken[MOST_EXPERTS], kept[MOST_EXPERTS];
    score(r, experts, logits, scores);
    for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + (bias ? bias[e] : 0.0f);
    memset(taken, 0, (size_t)experts);
    if (r->n_group > 1) drop_groups(r, experts, choice, taken, group_scores, kept);
    float sum = 0.0f;
    for (int64_t k = 0; k < r->top_k; k++) {
        indices[k] = take_largest(choice, experts, taken);
        weights[k] = scores[indices[k]];
        sum += weights[k];
    }
    for (int64_t k = 0; k < r->top_k; k++) {
        if (r->norm_topk_prob) weights[k] /= sum + 1e-20f;
        weights[k] *= r->scaling_factor;
    }
}

/* weights and indices [tokens, top_k] from logits [tokens, experts]; bias [experts] or NULL. Only the experts of
   `topk_group` of the `n_group` are eligible, at least top_k; a group's score is its largest or, with
   `group_score_top2`, the sum of its two largest. */
DSM_API int dsm_route(int isa, int threads, const float *logits, int64_t tokens, int64_t experts, const float *bias,
                      const Routing *routing, float *weights, int64_t *indices) {
    const int64_t groups = routing->n_group, top_k = routing->top_k;
    (void)isa;
    if (experts > MOST_EXPERTS || groups < 1 || experts % groups || routing->topk_group > groups || top_k < 1 ||
        top_k > experts / groups * routing->topk_group ||
        (routing->group_score_top2 && groups > 1 && experts / groups < 2))
        return DSM_BAD_ARGUMENT;
    threads = dsm_threads(threads, tokens * experts * top_k);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tokens; t++)
            route(routing, experts, bias, logits + t * experts, weights + t * top_k, indices + t * top_k);
        dsm_restore_mode(mode);
    }
    return DSM_OK;
}
