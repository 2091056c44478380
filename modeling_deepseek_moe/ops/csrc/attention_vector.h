/* The kernels of latent attention on vectors of WIDTH fp32 lanes; part of `kernels_vector.h`.

   Scores are products of `gemm`, with the heads' queries for tokens and the cached latents for weights. */

#define ABSORBED_ROWS 4
#define WIDEN_AHEAD 8 /* rows */

/* `gemv` (constant) weight rows times their factors are added to the sums of a strip of 4 * WIDTH bytes of each row; the
   j-th vector holds columns per_lane * l + j. */
DSM_INLINE void transposed_strip(const char *row, int64_t pitch, int64_t rest, const F *factor, float *sums, I *found,
                                 const int per_lane, const int rows) {
    F acc[4];
    UNROLL for (int j = 0; j < per_lane; j++) acc[j] = *(const F *)(sums + j * WIDTH);
    UNROLL for (int r = 0; r < rows; r++) {
        const I raw = load_bytes(row + r * pitch, rest);
        if (per_lane == 4) {
            const Codes codes = split(raw);
            *found = look(*found, raw);
            UNROLL for (int j = 0; j < 4; j++) acc[j] += factor[r] * code(codes, j);
        } else {
            acc[0] += factor[r] * (F)(raw << 16);
            acc[1] += factor[r] * (F)(raw & (int32_t)0xffff0000);
        }
    }
    UNROLL for (int j = 0; j < per_lane; j++) * (F *)(sums + j * WIDTH) = acc[j];
}

/* `gemv` whole rows, which lie in one row of blocks; sums: as many floats as a packed row has */
DSM_INLINE void transposed_rows(const float *q, const Matrix *w, int64_t r, float *sums, I *found, const int per_lane,
                                const int rows) {
    const int itemsize = 4 / per_lane;
    const int64_t pitch = w->cols * itemsize;
    const char *row = (const char *)w->data + r * pitch;
    const float *scale = dsm_block_scale(w, r, 0);
    for (int64_t k = 0; k < w->cols; k += DSM_BLOCK, scale++) {
        const int64_t end = dsm_min(DSM_BLOCK, w->cols - k) * itemsize;
        F factor[ABSORBED_ROWS];
        UNROLL for (int i = 0; i < rows; i++) factor[i] = spread(per_lane == 4 ? q[i] * *scale * PACKED_GAIN : q[i]);
        for (int64_t i = 0; i < end; i += 4 * WIDTH) {
            const char *at = row + k * itemsize + i;
            if (i % 64 == 0) UNROLL for (int j = 0; j < rows; j++) __builtin_prefetch(at + j * pitch + AHEAD, 0, 2);
            if (end - i >= 4 * WIDTH)
                transposed_strip(at, pitch, 4 * WIDTH, factor, sums + k + i / itemsize, found, per_lane, rows);
            else transposed_strip(at, pitch, end - i, factor, sums + k + i / itemsize, found, per_lane, rows);
        }
    }
}
#define ABSORB(NAME, PER_LANE)                                                                                        \
    static __attribute__((noinline)) int NAME(const float *q, const Matrix *w, int64_t first, int64_t count,          \
                                              float *sums) {                                                          \
        I found = {0};                                                                                                \
        int64_t i = 0;                                                                                                \
        while (i < count) {                                                                                           \
            const int64_t r = first + i;                                                                              \
            if (r % ABSORBED_ROWS == 0 && i + ABSORBED_ROWS <= count) {                                               \
                transposed_rows(q + i, w, r, sums, &found, PER_LANE, ABSORBED_ROWS);                                  \
                i += ABSORBED_ROWS;                                                                                   \
            } else {                                                                                                  \
                transposed_rows(q + i, w, r, sums, &found, PER_LANE, 1);                                              \
                i++;                                                                                                  \
            }                                                                                                         \
        }                                                                                                             \
        return nan_seen(found);                                                                                       \
    }
ABSORB(absorb_fp8, 4)
ABSORB(absorb_bf16, 2)

void SHARED(gemv_transposed)(const float *q, const Matrix *w, int64_t first, int64_t count, float *out, float *sums) {
    if (dsm_is_four_bit(w->dtype)) {
        transposed_four_bit(q, w, first, count, out, sums);
        return;
    }
    const int per_lane = w->dtype == DSM_FP8 ? 4 : 2, group = per_lane * WIDTH;
    int nan;
    memset(sums, 0, sizeof(float) * dsm_blocks(w->cols) * DSM_BLOCK);
    nan = w->dtype == DSM_FP8 ? absorb_fp8(q, w, first, count, sums) : absorb_bf16(q, w, first, count, sums);
    for (int64_t k = 0; k < w->cols; k += group)
        for (int l = 0; l < WIDTH; l++)
            for (int j = 0; j < per_lane; j++) {
                const int64_t c = k + l * per_lane + j;
                const float sum = sums[k + j * WIDTH + l];
                if (c < w->cols) out[c] = nan && per_lane == 4 ? NAN : per_lane == 4 ? PACKED_GAIN * sum : sum;
            }
}

/* scores become weights in place, and zeros after them up to `room` */
float SHARED(online_softmax)(float *scores, int64_t n, int64_t room, float scaling, const float *mask, float *peak,
                             float *norm) {
    const float old = *peak;
    F most = spread(old), total = zeros();
    int64_t i = 0;
    for (i = n; i < (n + WIDTH - 1) / WIDTH * WIDTH; i++) scores[i] = -INFINITY;
    for (i = 0; i < n; i += WIDTH) {
        F v = scaling * load(scores + i);
        if (mask) {
            float masks[WIDTH] = {0};
            if (i + WIDTH <= n) v += load(mask + i);
            else {
                memcpy(masks, mask + i, sizeof(float) * (n - i));
                v += load(masks);
            }
        }
        store(scores + i, v);
        most = (F)choose(v > most, (I)v, (I)most);
    }
    float top = old;
    for (int l = 0; l < WIDTH; l++) top = most[l] > top ? most[l] : top;
    for (i = 0; i < n; i += WIDTH) {
        F v = exponential(load(scores + i) - top);
        total += v;
        store(scores + i, v);
    }
    memset(scores + n, 0, sizeof(float) * (room - n));
    const float decay = expf(old - top);
    *norm = *norm * decay + sum(total);
    *peak = top;
    return decay;
}

/* columns from c on of `count` rows as fp32, a panel after the other; zeros after the last. `dtype` is a constant. */
DSM_INLINE void widen(const Matrix *v, int64_t first, int64_t count, int64_t c, int64_t end, float *to,
                      const int dtype) {
    const int64_t size = (int64_t)dsm_itemsize(dtype);
    for (int64_t k = 0; k < count; k++, to += PANEL) {
        const int64_t at = (first + k) * v->cols;
        float *panel = to;
        /* a line of each row is read, which comes from the second cache, and nothing fetches at this stride */
        __builtin_prefetch((const char *)v->data + (at + c + WIDEN_AHEAD * v->cols) * size);
        for (int64_t j = c; j < end; j += PANEL, panel += DSM_BLOCK * PANEL)
            if (v->cols - j >= PANEL)
                UNROLL for (int i = 0; i < PANEL; i += WIDTH) * (F *)(panel + i) =
                    load_any(v->data, dtype, at + j + i);
            else
                for (int i = 0; i < PANEL; i++)
                    panel[i] = j + i < v->cols ? dsm_load(v->data, dtype, at + j + i) : 0.0f;
    }
}
static void accumulate_pv(const float *p, int64_t ldp, int64_t tokens, const Matrix *v, int64_t first, int64_t count,
                          const float *decay, float *out, int64_t ldo, void *scratch, PrefetchStream *ahead) {
    const size_t stride = sizeof(float) * ldp;
    for (int64_t c = 0; c < v->cols; c += PV_PANELS * PANEL) {
        float *values = scratch;
        const int64_t end = dsm_min(c + PV_PANELS * PANEL, v->cols);
        if (v->dtype == DSM_BF16) widen(v, first, count, c, end, values, DSM_BF16);
        else if (v->dtype == DSM_F32) widen(v, first, count, c, end, values, DSM_F32);
        else widen(v, first, count, c, end, values, DSM_F16);
        for (int64_t j = c; j < end; j += PANEL, values += DSM_BLOCK * PANEL)
            fma_tokens((const char *)p, stride, tokens, values, count, 1.0f, decay, out + j, ldo, ahead);
    }
}

void SHARED(add_rows)(const float *q, int64_t count, const void *rows, int64_t pitch, int64_t n, float *out) {
    int64_t c = 0;
    for (; c + 4 * WIDTH <= n; c += 4 * WIDTH) { /* four sums at a time: each waits for its last product */
        F sums[4];
        UNROLL for (int v = 0; v < 4; v++) sums[v] = load_any(out, DSM_F32, c + v * WIDTH);
        for (int64_t i = 0; i < count; i++)
            UNROLL for (int v = 0; v < 4; v++) sums[v] += q[i] * load_any(rows, DSM_BF16, i * pitch + c + v * WIDTH);
        UNROLL for (int v = 0; v < 4; v++) store_any(out, DSM_F32, c + v * WIDTH, sums[v]);
    }
    for (; c < n; c++)
        for (int64_t i = 0; i < count; i++) out[c] += q[i] * dsm_load(rows, DSM_BF16, i * pitch + c);
}

/* a panel's columns at a time; what is not a number stays that */
void SHARED(weigh_heads)(const float *products, int64_t ldp, int64_t heads, const float *weights, int64_t n,
                         float *out) {
    for (int64_t c = 0; c < n; c += PANEL) {
        F sums[PANEL_VECTORS];
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) sums[v] = zeros();
        for (int64_t h = 0; h < heads; h++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {
                const F product = load(products + h * ldp + c + v * WIDTH);
                sums[v] += weights[h] * (F)choose(product < 0.0f, (I){0}, (I)product);
            }
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) store(out + c + v * WIDTH, sums[v]);
    }
}
