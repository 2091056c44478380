/* One dot product per weight row, for few tokens; part of `kernels_vector.h`. */

DSM_INLINE F joined(const F *part, const int parts) {
    return parts == 4 ? (part[0] + part[1]) + (part[2] + part[3]) : parts == 2 ? part[0] + part[1] : part[0];
}

/* Four tokens: one block of ROWS_AT_ONCE weight rows, `pitch` bytes apart, of which `rest` columns exist, a constant but at
   a row's end; or of one row. */
DSM_INLINE void add_block(const float *x, size_t stride, const uint8_t *w, int64_t pitch, int64_t rest, float scale,
                          const char *ahead, F *total, I *found, const int rows, const int tokens) {
    F part[ACCUMULATORS];
    UNROLL for (int i = 0; i < rows * tokens; i++) part[i] = zeros();
    for (int64_t i = 0; i < rest; i += 4 * WIDTH) {
        Codes codes[ROWS_AT_ONCE];
        UNROLL for (int r = 0; r < rows; r++) {
            I raw = load_bytes(w + r * pitch + i, rest - i);
            if (i % 64 == 0) __builtin_prefetch(ahead + r * pitch + i, 0, 3);
            found[r] = look(found[r], raw);
            codes[r] = split(raw);
        }
        UNROLL for (int j = 0; j < 4; j++) {
            F value[ROWS_AT_ONCE];
            UNROLL for (int r = 0; r < rows; r++) value[r] = code(codes[r], j);
            UNROLL for (int t = 0; t < tokens; t++) {
                const F xt = load((const float *)((const char *)x + t * stride) + i + j * WIDTH);
                UNROLL for (int r = 0; r < rows; r++) part[r * tokens + t] += value[r] * xt;
            }
        }
    }
    UNROLL for (int i = 0; i < rows * tokens; i++) total[i] += scale * part[i];
}
DSM_INLINE void add_fp8(const float *x, size_t stride, const uint8_t *w, int64_t pitch, const float *scale,
                        int64_t cols, const char *ahead, F *sums, I *found, const int rows, const int tokens) {
    F total[ACCUMULATORS];
    I seen[ROWS_AT_ONCE];
    int64_t k = 0;
    UNROLL for (int i = 0; i < rows * tokens; i++) total[i] = sums[i];
    UNROLL for (int r = 0; r < rows; r++) seen[r] = found[r];
    for (; k + DSM_BLOCK <= cols; k += DSM_BLOCK)
        add_block(x + k, stride, w + k, pitch, DSM_BLOCK, *scale++, ahead + k, total, seen, rows, tokens);
    if (k < cols) add_block(x + k, stride, w + k, pitch, cols - k, *scale, ahead + k, total, seen, rows, tokens);
    UNROLL for (int i = 0; i < rows * tokens; i++) sums[i] = total[i];
    UNROLL for (int r = 0; r < rows; r++) found[r] = seen[r];
}
/* 64 columns of a bf16 row, of which `rest` exist: a constant but at a row's end. Rows in turns are read as fast as memory
   allows, and faster if nothing is fetched ahead (NULL). */
DSM_INLINE void add_pairs(const float *x, size_t stride, const uint16_t *w, int64_t rest, const char *ahead, F *total,
                          const int parts, const int tokens) {
    UNROLL for (int i = 0; i < 64; i += 2 * WIDTH) {
        if (i >= rest) break;
        const I raw = load_bytes(w + i, 2 * (rest - i));
        const F low = (F)(raw << 16), high = (F)(raw & (int32_t)0xffff0000);
        if (ahead && i % 32 == 0) __builtin_prefetch(ahead + 2 * i, 0, 2);
        UNROLL for (int t = 0; t < tokens; t++) {
            const float *xt = (const float *)((const char *)x + t * stride) + i;
            F *to = total + t * parts + i / WIDTH % parts;
            to[0] += low * load(xt);
            to[1] += high * load(xt + WIDTH);
        }
    }
}
DSM_INLINE void add_bf16(const float *x, size_t stride, const uint16_t *w, int64_t cols, const char *ahead, F *sums,
                         const int tokens) {
    const int parts = ACCUMULATORS / tokens;
    F total[ACCUMULATORS];
    int64_t k = 0;
    UNROLL for (int i = 0; i < parts * tokens; i++) total[i] = zeros();
    for (; k + 64 <= cols; k += 64) add_pairs(x + k, stride, w + k, 64, ahead + 2 * k, total, parts, tokens);
    if (k < cols) add_pairs(x + k, stride, w + k, cols - k, ahead + 2 * k, total, parts, tokens);
    UNROLL for (int t = 0; t < tokens; t++) sums[t] += joined(total + t * parts, parts);
}

/* out[t * ldo + r] = gain * sum(sums[r * tokens + t]), in the order in which `sum` adds */
DSM_INLINE void add_lanes(const F *sums, int64_t count, float gain, float *out, int64_t ldo, const int tokens) {
    for (int t = 0; t < tokens; t++)
        for (int64_t r = 0; r < count; r += WIDTH) {
            I lane[WIDTH];
            F all[WIDTH];
            for (int i = 0; i < WIDTH; i++) lane[i] = r + i < count ? (I)sums[(r + i) * tokens + t] : (I){0};
            transpose(lane);
            UNROLL for (int i = 0; i < WIDTH; i++) all[i] = (F)lane[i];
            UNROLL for (int half = WIDTH / 2; half; half /= 2) UNROLL for (int i = 0; i < half; i++) all[i] +=
                all[i + half];
            all[0] *= gain;
            if (r + WIDTH <= count) store(out + t * ldo + r, all[0]);
            else memcpy(out + t * ldo + r, all, sizeof(float) * (count - r));
        }
}

/* One block of `readers` rows, in step: they share what is loaded of x. With one sum for each row and token there is room in
   the registers; two make AVX2 a tenth slower (a Xeon). */
DSM_INLINE void add_in_step(const float *x, size_t stride, const uint8_t *w, int64_t pitch, int64_t rest, float scale,
                            F *total, I *found, const int readers, const int tokens) {
    F part[ACCUMULATORS];
    UNROLL for (int i = 0; i < readers * tokens; i++) part[i] = zeros();
    for (int64_t i = 0; i < rest; i += 4 * WIDTH) UNROLL for (int q = 0; q < readers; q++) {
            const uint8_t *at = w + q * pitch + i;
            const I raw = load_bytes(at, rest - i);
            const Codes codes = split(raw);
            /* into the first cache: into the second alone, codes come a twentieth slower (a Xeon) */
            if (i % 64 == 0) __builtin_prefetch(at + AHEAD, 0, 3);
            *found = look(*found, raw);
            UNROLL for (int j = 0; j < 4; j++) {
                const F value = code(codes, j);
                UNROLL for (int t = 0; t < tokens; t++) part[q * tokens + t] +=
                    value * load((const float *)((const char *)x + t * stride) + i + j * WIDTH);
            }
        }
    UNROLL for (int i = 0; i < readers * tokens; i++) total[i] += scale * part[i];
}
static __attribute__((noinline)) int has_nan(const uint8_t *codes, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if ((codes[i] & 0x7f) == 0x7f) return 1;
    return 0;
}
/* FP8 rows row, row + apart .. of one row of blocks, `readers` of them; token t's sum of the q-th becomes
   sums[q * apart * tokens + t]. */
DSM_INLINE void fp8_turn(const float *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, F *sums,
                         const int readers, const int tokens) {
    const int64_t cols = w->cols, pitch = apart * cols;
    const uint8_t *from = (const uint8_t *)w->data + row * cols;
    const float *scale = dsm_block_scale(w, row, 0);
    F total[ACCUMULATORS];
    I found = {0}; /* of all of them: a register for each is one too many */
    int64_t k = 0;
    UNROLL for (int i = 0; i < readers * tokens; i++) total[i] = zeros();
    for (; k + DSM_BLOCK <= cols; k += DSM_BLOCK)
        add_in_step(x + k, stride, from + k, pitch, DSM_BLOCK, *scale++, total, &found, readers, tokens);
    if (k < cols) add_in_step(x + k, stride, from + k, pitch, cols - k, *scale, total, &found, readers, tokens);
    const int any = nan_seen(found);
    UNROLL for (int q = 0; q < readers; q++) {
        const int nan = any && has_nan(from + q * pitch, cols);
        F *to = sums + q * apart * tokens;
        UNROLL for (int t = 0; t < tokens; t++) to[t] = nan ? spread(NAN) : total[q * tokens + t];
    }
}
/* The same of rows in bf16. */
DSM_INLINE void bf16_turn(const float *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, F *sums,
                          const int readers, const int tokens) {
    const int64_t cols = w->cols, pitch = apart * cols;
    const uint16_t *from = (const uint16_t *)w->data + row * cols;
    const int parts = 4 / tokens, own = parts * tokens;
    F total[READERS * 4];
    int64_t k = 0;
    UNROLL for (int i = 0; i < readers * own; i++) total[i] = zeros();
    for (; k + DSM_BLOCK <= cols; k += DSM_BLOCK)
        UNROLL for (int q = 0; q < readers; q++) UNROLL for (int i = 0; i < DSM_BLOCK; i += 64)
            add_pairs(x + k + i, stride, from + q * pitch + k + i, 64, NULL, total + own * q, parts, tokens);
    for (; k < cols; k += 64)
        UNROLL for (int q = 0; q < readers; q++)
            add_pairs(x + k, stride, from + q * pitch + k, cols - k, NULL, total + own * q, parts, tokens);
    UNROLL for (int q = 0; q < readers; q++) UNROLL for (int t = 0; t < tokens; t++) sums[q * apart * tokens + t] =
        joined(total + own * q + parts * t, parts);
}
/* rows of one row of blocks, for a token or two */
#define IN_TURNS(NAME, TURN, TOKENS, GAIN)                                                                            \
    static __attribute__((noinline)) void NAME(const char *x, size_t stride, const Matrix *w, int64_t first,          \
                                               int64_t count, float *out, int64_t ldo) {                              \
        const int64_t turns = count / READERS;                                                                        \
        F sums[DSM_BLOCK * TOKENS];                                                                                   \
        for (int64_t i = 0; i < turns; i++)                                                                           \
            TURN((const float *)x, stride, w, first + i, turns, sums + i * TOKENS, READERS, TOKENS);                  \
        for (int64_t i = turns * READERS; i < count; i++)                                                             \
            TURN((const float *)x, stride, w, first + i, 1, sums + i * TOKENS, 1, TOKENS);                            \
        add_lanes(sums, count, GAIN, out, ldo, TOKENS);                                                               \
    }
IN_TURNS(fp8_in_turns_1, fp8_turn, 1, PACKED_GAIN)
IN_TURNS(fp8_in_turns_2, fp8_turn, 2, PACKED_GAIN)
IN_TURNS(bf16_in_turns_1, bf16_turn, 1, 1.0f)
IN_TURNS(bf16_in_turns_2, bf16_turn, 2, 1.0f)

/* Up to DSM_BLOCK weight rows of four tokens. Long ones go a segment at a time, so that the segments of x that all rows meet stay
   in the first cache; the next row's segment is fetched meanwhile. */
static __attribute__((noinline)) void four_tokens(const char *x, size_t stride, const Matrix *w, int64_t first,
                                                  int64_t count, float *out, int64_t ldo) {
    enum { tokens = 4 };
    F sums[DSM_BLOCK * tokens];
    I found[DSM_BLOCK], any = {0};
    const int64_t cols = w->cols, itemsize = w->dtype == DSM_FP8 ? 1 : 2, pitch = cols * itemsize;
    const int fp8 = w->dtype == DSM_FP8;
    const int64_t segment = cols <= 2 * SEGMENT ? cols : SEGMENT;
    for (int64_t i = 0; i < count * tokens; i++) sums[i] = zeros();
    for (int64_t r = 0; r < count; r++) found[r] = (I){0};
    for (int64_t k = 0; k < cols; k += segment) {
        const float *xk = (const float *)x + k;
        const int64_t length = dsm_min(segment, cols - k);
        for (int64_t r = 0, n; r < count; r += n) {
            const char *row = (const char *)w->data + ((first + r) * cols + k) * itemsize;
            const float *scale = dsm_block_scale(w, first + r, k);
            /* rows at once have their scales in common */
            n = fp8 && r + ROWS_AT_ONCE <= count && (first + r) % ROWS_AT_ONCE == 0 ? ROWS_AT_ONCE : 1;
            const char *ahead = segment == cols ? row + (n - 1) * pitch + AHEAD
                                : r + n < count ? row + n * pitch
                                                : row + segment * itemsize - (count - n) * pitch;
            F *to = sums + r * tokens;
            if (!fp8) add_bf16(xk, stride, (const uint16_t *)row, length, ahead, to, tokens);
            else if (n == 1)
                add_fp8(xk, stride, (const uint8_t *)row, pitch, scale, length, ahead, to, found + r, 1, tokens);
            else
                add_fp8(xk, stride, (const uint8_t *)row, pitch, scale, length, ahead, to, found + r, ROWS_AT_ONCE,
                        tokens);
        }
    }
    for (int64_t r = 0; r < count; r++) any |= found[r];
    for (int64_t r = 0; r < count && nan_seen(any); r++)
        for (int t = 0; t < tokens && nan_seen(found[r]); t++) sums[r * tokens + t] = spread(NAN);
    add_lanes(sums, count, fp8 ? PACKED_GAIN : 1.0f, out, ldo, tokens);
}

static void gemv_four_bit(const char *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                          float *out, int64_t ldo);

static void gemv(const void *given, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                 float *out, int64_t ldo, const void *next) {
    const char *x = given;
    const int fp8 = w->dtype == DSM_FP8;
    const int64_t bytes = dsm_row_bytes(w->dtype, w->cols);
    const int64_t near = tokens > 2 && bytes ? dsm_max(READERS, NEAR_BYTES / bytes) : DSM_BLOCK;
    (void)next; /* what comes after these rows is fetched where it lies after them */
    if (dsm_is_four_bit(w->dtype)) {
        gemv_four_bit(x, stride, tokens, w, first, count, out, ldo);
        return;
    }
    for (int64_t r = 0, n; r < count; r += n) { /* within a row of blocks */
        int64_t t = 0;
        n = dsm_min(dsm_min(count - r, near), DSM_BLOCK - (first + r) % DSM_BLOCK);
        for (; t + 4 <= tokens; t += 4) four_tokens(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
        if (t + 2 <= tokens) {
            (fp8 ? fp8_in_turns_2 : bf16_in_turns_2)(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
            t += 2;
        }
        if (t < tokens)
            (fp8 ? fp8_in_turns_1 : bf16_in_turns_1)(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
    }
}
