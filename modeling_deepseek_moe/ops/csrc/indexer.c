/* The lightning indexer (DeepSeek-V3.2 report, section 2.1): of each query's keys those with the k greatest
       I[t] = sum over heads h of w[h] * max(q[h] . k[t], 0).
   A few queries' heads meet KEYS keys at a time, as tokens of a product with the keys for weights; a query keeps the
   candidates among them. So memory is for a few queries at a time, and never for as many scores as there are pairs.

   Of the keys of a query, in their order, candidates are those whose score is above the k-th best so far, as it was when
   the candidates were last cut down to k: by radix selection over the bits of scores, which leaves their order as it is, so
   that nothing is ever sorted. Equal scores: the earlier key.

   Where there are fewer queries than threads have use for, each one's keys are cut into chunks, whose candidates are put
   one after the other and cut down again. What is chosen depends on neither chunks nor threads. */
#include "engine.h"

#include <math.h>

#define KEYS 64          /* that are scored at a time */
#define TOKENS 256       /* heads of several queries that meet them, or of one */
#define LEAST_CHUNK 1024 /* keys */
#define TASKS 4          /* per thread, at least, where there are keys enough */
#define ROOM 2048        /* least candidates between two selections */
#define HIDDEN INT32_MIN /* the rank of no score */
#define DIGITS 2048

/* Candidates of one query: ranks of their scores, and keys, which ascend. */
typedef struct {
    int32_t *ranks, *keys;
    int64_t count;
    int32_t least; /* only greater ranks are candidates */
} Best;

typedef struct {
    const Kernels *kernels;
    const Indexer *given;
    const Visible *visible;
    int dtype;
    int64_t topk, queries, groups; /* queries of a task, tasks of a sequence */
    int64_t chunk, chunks, room;   /* keys; room: candidates of a query */
    size_t stride;
    int32_t *ranks, *keys; /* where there are chunks, of their best: [batch, tokens, chunks, topk] */
    int64_t *counts;       /* [batch, tokens, chunks] */
    int32_t *out;
} Job;

typedef struct {
    char *packed;
    float *products;
    void *scratch;
    int32_t *candidates, *spare;
    Best *best; /* one a query */
} Buffers;

/* Whole numbers in the order of the scores. What is not a number is never chosen. */
DSM_INLINE int32_t rank_of(float score) {
    int32_t bits;
    const float value = score + 0.0f; /* -0 is 0 */
    memcpy(&bits, &value, 4);
    return value > -INFINITY ? bits ^ (bits >> 31 & INT32_MAX) : HIDDEN;
}

/* The k-th greatest of n ranks, digit by digit, and how many of those equal to it belong to the k greatest. */
static int32_t kth_greatest(const int32_t *ranks, int64_t n, int64_t k, int32_t *spare, int64_t *equal) {
    static const int SHIFTS[] = {21, 10, 0};
    for (int i = 0; i < 3; i++) {
        int32_t counts[DIGITS] = {0}, digit = DIGITS - 1;
        int64_t same = 0;
#define DIGIT(rank) (int32_t)(((uint32_t)(rank) ^ 0x80000000u) >> SHIFTS[i] & (i < 2 ? DIGITS - 1 : DIGITS / 2 - 1))
        for (int64_t j = 0; j < n; j++) counts[DIGIT(ranks[j])]++;
        for (; counts[digit] < k; digit--) k -= counts[digit];
        for (int64_t j = 0; j < n; j++) {
            const int32_t rank = ranks[j];
            spare[same] = rank;
            same += DIGIT(rank) == digit;
        }
#undef DIGIT
        ranks = spare, n = same;
    }
    *equal = k;
    return spare[0];
}

/* no more than k candidates, in their order */
static void cut_down(Best *best, int64_t k, int32_t *spare) {
    int64_t equal, kept = 0;
    if (best->count <= k) return;
    const int32_t least = kth_greatest(best->ranks, best->count, k, spare, &equal);
    for (int64_t i = 0; i < best->count; i++) {
        const int32_t rank = best->ranks[i];
        const int is_equal = rank == least && equal > 0;
        best->ranks[kept] = rank;
        best->keys[kept] = best->keys[i];
        kept += (rank > least) | is_equal;
        equal -= is_equal;
    }
    best->count = kept;
    best->least = least;
}

/* the ranks of n keys, first .., of a query from their scores; NULL: all have the same */
static void rank(const Visible *visible, int64_t b, int64_t s, int64_t first, int64_t n, const float *scores,
                 int32_t *ranks) {
    const int64_t at = b * visible->batch + s * visible->token + first;
    for (int64_t i = 0; i < n; i++) ranks[i] = scores ? rank_of(scores[i]) : 0;
    if (!visible->values) return;
    if (visible->dtype == DSM_BOOL) {
        const uint8_t *seen = (const uint8_t *)visible->values + at;
        for (int64_t i = 0; i < n; i++) ranks[i] = seen[i] ? ranks[i] : HIDDEN;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const float added = dsm_load(visible->values, visible->dtype, at + i);
        ranks[i] = added < visible->lowest ? HIDDEN : scores ? rank_of(scores[i] + added) : 0;
    }
}
static void add_candidates(Best *best, const int32_t *ranks, int64_t first, int64_t n) {
    int64_t count = best->count;
    for (int64_t i = 0; i < n; i++) {
        best->ranks[count] = ranks[i];
        best->keys[count] = (int32_t)(first + i);
        count += ranks[i] > best->least;
    }
    best->count = count;
}

/* how many of the first keys a query may see, if no mask hides them */
DSM_INLINE int64_t end_of(const Job *job, int64_t s) {
    const Indexer *given = job->given;
    return job->visible->causal ? given->length - given->tokens + s + 1 : given->length;
}

static void pack_queries(const Job *job, int64_t b, int64_t first, int64_t queries, char *packed) {
    const Indexer *given = job->given;
    const int64_t rows = queries * given->heads, group = job->kernels->panel_tokens;
    const size_t size = dsm_itemsize(job->dtype);
    for (int64_t t = 0; t < rows; t += group) {
        const void *x[DSM_GROUP_TOKENS];
        const int64_t count = dsm_min(group, rows - t);
        for (int64_t i = 0; i < count; i++) {
            const int64_t s = first + (t + i) / given->heads, h = (t + i) % given->heads;
            x[i] = (const char *)given->queries +
                   (b * given->query_batch + s * given->query_token + h * given->query_head) * size;
        }
        dsm_pack(job->kernels, 1, x, count, job->dtype, given->width, job->dtype, packed, job->stride, t);
    }
}

/* the scores of n keys, first .., for some queries of a sequence, and what is a candidate by them */
static void score(const Job *job, int64_t b, int64_t s0, int64_t queries, const Matrix *keys, int64_t first, int64_t n,
                  Buffers *buffers) {
    const Indexer *given = job->given;
    const int64_t columns = dsm_panels(job->kernels, n);
    const char *next = dsm_row(keys, dsm_min(first + KEYS, keys->rows));
    PrefetchStream ahead = {next, dsm_row(keys, dsm_min(first + 2 * KEYS, keys->rows))};
    float scores[KEYS] __attribute__((aligned(64)));
    int32_t ranks[KEYS];
    job->kernels->gemm(buffers->packed, job->stride, queries * given->heads, keys, first, n, buffers->products,
                       buffers->scratch, &ahead);
    for (int64_t q = 0; q < queries; q++) {
        Best *best = buffers->best + q;
        const int64_t seen = dsm_min(n, end_of(job, s0 + q) - first);
        if (seen <= 0) continue;
        job->kernels->weigh_heads(buffers->products + q * given->heads * columns, columns, given->heads,
                                  given->weights + ((b * given->tokens) + s0 + q) * given->heads, columns, scores);
        rank(job->visible, b, s0 + q, first, seen, scores, ranks);
        if (best->count + KEYS > job->room) cut_down(best, job->topk, buffers->spare);
        add_candidates(best, ranks, first, seen);
    }
}

/* Queries that may see no more than k keys see them all, whatever their scores. */
static void take_all(const Job *job, int64_t b, int64_t s, int64_t first, int64_t end, Best *best) {
    int32_t ranks[KEYS];
    for (int64_t k = first; k < end; k += KEYS) {
        const int64_t n = dsm_min(KEYS, end - k);
        rank(job->visible, b, s, k, n, NULL, ranks);
        add_candidates(best, ranks, k, n);
    }
}

static void write(const Job *job, int64_t query, const Best *best) {
    int32_t *to = job->out + query * job->topk;
    memcpy(to, best->keys, sizeof *to * best->count);
    for (int64_t i = best->count; i < job->topk; i++) to[i] = -1;
}

/* some queries of a sequence, and one chunk of their keys; the last queries, which may see most keys, come first */
static void choose(const Job *job, int64_t task, Buffers *buffers) {
    const Indexer *given = job->given;
    const int64_t group = given->batch * job->groups - 1 - task / job->chunks, part = task % job->chunks;
    const int64_t b = group / job->groups, s0 = group % job->groups * job->queries;
    const int64_t queries = dsm_min(job->queries, given->tokens - s0), last = end_of(job, s0 + queries - 1);
    const int64_t first = part * job->chunk, end = dsm_min(first + job->chunk, last);
    const char *data = (const char *)given->keys + b * given->key_batch * dsm_itemsize(job->dtype);
    const Matrix keys = {data, NULL, given->length, given->width, job->dtype, 0, NULL};
    for (int64_t q = 0; q < queries; q++) {
        int32_t *room = buffers->candidates + 2 * q * job->room;
        buffers->best[q] = (Best){room, room + job->room, 0, HIDDEN};
        if (last <= job->topk) take_all(job, b, s0 + q, first, dsm_min(end, end_of(job, s0 + q)), buffers->best + q);
    }
    if (last > job->topk) {
        pack_queries(job, b, s0, queries, buffers->packed);
        for (int64_t k = first; k < end; k += KEYS)
            score(job, b, s0, queries, &keys, k, dsm_min(KEYS, end - k), buffers);
    }
    for (int64_t q = 0; q < queries; q++) {
        const int64_t query = b * given->tokens + s0 + q, at = query * job->chunks + part;
        Best *best = buffers->best + q;
        cut_down(best, job->topk, buffers->spare);
        if (job->chunks == 1) {
            write(job, query, best);
            continue;
        }
        job->counts[at] = best->count;
        memcpy(job->ranks + at * job->topk, best->ranks, sizeof(int32_t) * best->count);
        memcpy(job->keys + at * job->topk, best->keys, sizeof(int32_t) * best->count);
    }
}

/* the best of all chunks of one query */
static void merge(const Job *job, int64_t query, Buffers *buffers) {
    int32_t *ranks = job->ranks + query * job->chunks * job->topk, *keys = job->keys + query * job->chunks * job->topk;
    Best best = {ranks, keys, 0, HIDDEN};
    for (int64_t part = 0; part < job->chunks; part++) {
        const int64_t count = job->counts[query * job->chunks + part];
        memmove(ranks + best.count, ranks + part * job->topk, sizeof *ranks * count);
        memmove(keys + best.count, keys + part * job->topk, sizeof *keys * count);
        best.count += count;
    }
    cut_down(&best, job->topk, buffers->spare);
    write(job, query, &best);
}

static int make_buffers(const Job *job, Buffers *buffers) {
    const int64_t tokens = dsm_packed_tokens(job->kernels, job->queries * job->given->heads);
    buffers->packed = dsm_alloc(tokens * job->stride);
    buffers->products = dsm_alloc(sizeof(float) * tokens * dsm_panels(job->kernels, KEYS));
    buffers->scratch = dsm_alloc(job->kernels->scratch_bytes);
    buffers->candidates = dsm_alloc(2 * sizeof(int32_t) * job->room * job->queries);
    buffers->spare = dsm_alloc(sizeof(int32_t) * dsm_max(job->room, job->chunks * job->topk));
    buffers->best = dsm_alloc(sizeof(Best) * job->queries);
    return buffers->packed && buffers->products && buffers->scratch && buffers->candidates && buffers->spare &&
           buffers->best;
}
static void free_buffers(Buffers *buffers) {
    free(buffers->packed);
    free(buffers->products);
    free(buffers->scratch);
    free(buffers->candidates);
    free(buffers->spare);
    free(buffers->best);
}

static int run(const Job *job, int threads) {
    (void)threads; /* unused without OpenMP */
    const int64_t all = job->given->batch * job->given->tokens, tasks = job->given->batch * job->groups * job->chunks;
    int failed = 0;
    const uint64_t caller = dsm_exact_mode();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        Buffers buffers = {0};
        if (!make_buffers(job, &buffers)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; task++) choose(job, task, &buffers);
#pragma omp for schedule(static) nowait
            for (int64_t query = 0; query < (job->chunks > 1 ? all : 0); query++) merge(job, query, &buffers);
        }
        free_buffers(&buffers);
        dsm_restore_mode(mode);
    }
    dsm_restore_mode(caller);
    return failed ? DSM_NO_MEMORY : DSM_OK;
}

/* out [batch, tokens, topk]: the chosen keys of each query in their order, then -1. Queries and keys are of `dtype`. */
DSM_API int dsm_index(int isa, int threads, int dtype, const Indexer *given, const Visible *visible, int64_t topk,
                      int32_t *out) {
    const int64_t all = given->batch * given->tokens, length = given->length;
    int result = DSM_NO_MEMORY;
    if (topk < 1 || topk > length || length > INT32_MAX || given->heads < 1 || given->width < 1)
        return DSM_BAD_ARGUMENT;
    if (visible->causal && given->tokens > length) return DSM_BAD_ARGUMENT;
    if (all < 1) return DSM_OK;
    Job job = {
        .kernels = dsm_kernels(isa, dtype),
        .given = given,
        .visible = visible,
        .dtype = dtype,
        .topk = topk,
        .queries = dsm_min(dsm_max(TOKENS / given->heads, 1), given->tokens),
        .room = topk + dsm_max(topk, ROOM),
        .out = out,
    };
    job.stride = dsm_packed_stride(job.kernels, given->width, dtype);
    job.groups = (given->tokens + job.queries - 1) / job.queries;
    threads = dsm_threads(threads, all * length * given->width / 2);
    const int64_t groups = given->batch * job.groups, wanted = (TASKS * threads + groups - 1) / groups;
    job.chunk = threads == 1 ? length : dsm_max((length + wanted - 1) / wanted, LEAST_CHUNK);
    job.chunk = (job.chunk + KEYS - 1) / KEYS * KEYS;
    job.chunks = (length + job.chunk - 1) / job.chunk;
    const int64_t kept = job.chunks > 1 ? all * job.chunks : 1;
    job.ranks = dsm_alloc(sizeof(int32_t) * kept * topk);
    job.keys = dsm_alloc(sizeof(int32_t) * kept * topk);
    job.counts = dsm_alloc(sizeof(int64_t) * kept);
    if (job.ranks && job.keys && job.counts) result = run(&job, threads);
    free(job.ranks);
    free(job.keys);
    free(job.counts);
    return result;
}
