/* Plays back recorded calls of the CPU engine where there is no Python: emulated processors, other architectures.

   The file (see `record` in test_engine_native.py) holds calls with their inputs and what they gave where it was
   recorded. Each is made on every instruction set, with one thread and with three, and with denormals flushed by the
   caller: all of these give the same bits, and the recorded results but for rounding. */
#include "../modeling_deepseek_moe/ops/csrc/engine.h"

#include <math.h>
#include <stdio.h>

enum { INTEGER, REAL, INPUT, OUTPUT, NOTHING }; /* kinds of arguments */
enum { MOST = 16, MOST_BLOCKS = 256 };

static char *owned[MOST_BLOCKS]; /* what a call reads */
static int owned_count;

typedef struct {
    int64_t kind, size, dtype, integer;
    double real;
    char *data, *wanted;
} Argument;

int dsm_isa_best(void);
const char *dsm_isa_name(int isa);
int dsm_has_threads(void);
int dsm_dequantize(int, int, const uint8_t *, const float *, int64_t, int64_t, void *, int);
int dsm_dequantize_four_bit(int, int, const Matrix *, void *, int);
int dsm_index(int, int, int, const Indexer *, const Visible *, int64_t, int32_t *);
int dsm_sparse_attention(int, int, int, int64_t, int64_t, int64_t, const MlaShape *, const Queries *,
                         const LatentCache *, const int32_t *, int64_t, const Matrix *, float, void *);
int dsm_quantize(int, int, const void *, int, int64_t, int64_t, int, uint8_t *, float *);

static const char *const NAMES[] = {"linear",     "experts",         "rms_norm", "dequantize", "quantize",
                                    "mla_decode", "mla_project",     "route",    "moe",        "dequantize_four_bit",
                                    "index",      "sparse_attention"};

static int invoke(int64_t function, const Argument *a, int isa, int threads) {
#define I(i) a[i].integer
#define N(i) (int)a[i].integer
#define P(i) (void *)a[i].data
    switch (function) {
    case 0: return dsm_linear(isa, threads, N(0), P(1), I(2), P(3), P(4), P(5));
    case 1: return dsm_experts(isa, threads, N(0), P(1), I(2), I(3), P(4), P(5), I(6), P(7), P(8), P(9));
    case 2: return dsm_rms_norm(isa, threads, N(0), P(1), I(2), I(3), P(4), P(5));
    case 3: return dsm_dequantize(isa, threads, P(0), P(1), I(2), I(3), P(4), N(5));
    case 4: return dsm_quantize(isa, threads, P(0), N(1), I(2), I(3), N(4), P(5), P(6));
    case 5:
        return dsm_mla_decode(isa, threads, N(0), I(1), I(2), I(3), P(4), P(5), P(6), P(7), P(8), (float)a[9].real,
                              P(10));
    case 6: return dsm_mla_project(isa, threads, N(0), P(1), I(2), P(3), P(4), P(5), P(6), P(7), P(8), P(9));
    case 7: return dsm_route(isa, threads, P(0), I(1), I(2), P(3), P(4), P(5), P(6));
    case 8: return dsm_moe(isa, threads, N(0), P(1), I(2), I(3), P(4), P(5));
    case 9: return dsm_dequantize_four_bit(isa, threads, P(0), P(1), N(2));
    case 10: return dsm_index(isa, threads, N(0), P(1), P(2), I(3), P(4));
    case 11:
        return dsm_sparse_attention(isa, threads, N(0), I(1), I(2), I(3), P(4), P(5), P(6), P(7), I(8), P(9),
                                    (float)a[10].real, P(11));
    default: return -100;
    }
}

static void die(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(2);
}

static void read_all(FILE *file, void *to, size_t size) {
    if (size && fread(to, 1, size, file) != size) die("the file ends early");
}
static int64_t read_integer(FILE *file) {
    int64_t value;
    read_all(file, &value, sizeof value);
    return value;
}
/* memory of exactly this size, as far as malloc knows */
static char *read_block(FILE *file, int64_t size) {
    char *data = malloc(size ? (size_t)size : 1);
    if (!data) die("no memory");
    read_all(file, data, (size_t)size);
    return data;
}

/* memory that points to more of it, whose addresses are put where they belong; all of it is kept in `owned` */
static char *read_memory(FILE *file) {
    char *data = read_block(file, read_integer(file));
    if (owned_count == MOST_BLOCKS) die("a call with too many blocks of memory");
    owned[owned_count++] = data;
    for (int64_t pointers = read_integer(file); pointers > 0; pointers--) {
        const int64_t place = read_integer(file);
        char *target = read_memory(file);
        memcpy(data + place, &target, sizeof target);
    }
    return data;
}

static Argument read_argument(FILE *file) {
    Argument a = {0};
    a.kind = read_integer(file);
    switch (a.kind) {
    case INTEGER: a.integer = read_integer(file); break;
    case REAL: read_all(file, &a.real, sizeof a.real); break;
    case INPUT: a.data = read_memory(file); break;
    case OUTPUT:
        a.size = read_integer(file);
        a.dtype = read_integer(file);
        a.wanted = read_block(file, a.size);
        a.data = malloc(a.size ? (size_t)a.size : 1);
        break;
    case NOTHING: break;
    default: die("an argument of no kind");
    }
    return a;
}

/* whether it multiplies in bf16 what was recorded in fp32 */
static int in_bf16(const char *isa) { return strstr(isa, "bf16") || strstr(isa, "amx"); }

/* |found - wanted| / |wanted|; infinite where one is NaN and the other is not, or bits differ that must not */
static double distance(const Argument *a) {
    /* subnormal numbers have few bits, and vdpbf16ps takes those of activations for zeros; that is no error */
    double error = 0, size = 1e-60;
    if (a->dtype < 0) return memcmp(a->data, a->wanted, (size_t)a->size) ? INFINITY : 0;
    for (int64_t i = 0; i < a->size / (int64_t)dsm_itemsize((int)a->dtype); i++) {
        const double found = dsm_load(a->data, (int)a->dtype, i), wanted = dsm_load(a->wanted, (int)a->dtype, i);
        if (isnan(found) != isnan(wanted)) return INFINITY;
        if (isnan(wanted)) continue;
        error += (found - wanted) * (found - wanted);
        size += wanted * wanted;
    }
    return sqrt(error / size);
}

static double allowed(const Argument *a, const char *isa) {
    if (in_bf16(isa)) return 2e-2;
    return a->dtype == DSM_F32 ? 1e-5 : a->dtype == DSM_F16 ? 1e-3 : 4e-3;
}

#if defined(__x86_64__)
static uint64_t flush(int on) {
    _mm_setcsr(on ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
    return 1;
}
static int flushes(void) { return (_mm_getcsr() & 0x8040u) == 0x8040u; }
#elif defined(__aarch64__)
static uint64_t flush(int on) {
    const uint64_t mode = on ? 1ull << 24 : 0;
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
    return 1;
}
static int flushes(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode >> 24 & 1;
}
#else
static uint64_t flush(int on) { return (void)on, 0; }
static int flushes(void) { return 1; }
#endif

static void forget(Argument *a, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (a[i].kind == OUTPUT) memset(a[i].data, 0, (size_t)a[i].size);
}

int main(int argc, char **argv) {
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    int failures = 0, calls = 0;
    int64_t function;
    if (!file) die("usage: engine_harness FILE");
    while (fread(&function, sizeof function, 1, file) == 1) {
        Argument a[MOST];
        const int64_t count = read_integer(file);
        if (function < 0 || function > 11 || count > MOST) die("a call of no function");
        for (int64_t i = 0; i < count; i++) a[i] = read_argument(file);
        for (int isa = 0; isa <= dsm_isa_best(); isa++, calls++) {
            char *first[MOST] = {0};
            for (int way = 0; way < 3; way++) { /* one thread; three; flushing */
                forget(a, count);
                flush(way == 2);
                const int result = invoke(function, a, isa, way == 1 ? 3 : 1), kept = flushes();
                flush(0);
                if (result || (way == 2 && !kept)) {
                    printf("%s on %s: returned %d, mode kept: %d\n", NAMES[function], dsm_isa_name(isa), result, kept);
                    failures++;
                }
                for (int64_t i = 0; i < count; i++) {
                    if (a[i].kind != OUTPUT) continue;
                    if (!way) {
                        const double off = distance(a + i), most = allowed(a + i, dsm_isa_name(isa));
                        if (!(off <= most)) {
                            printf("%s on %s: off by %g, allowed %g\n", NAMES[function], dsm_isa_name(isa), off, most);
                            failures++;
                        }
                        first[i] = memcpy(malloc((size_t)a[i].size + 1), a[i].data, (size_t)a[i].size);
                    } else if (memcmp(first[i], a[i].data, (size_t)a[i].size)) {
                        printf("%s on %s: %s changes bits\n", NAMES[function], dsm_isa_name(isa),
                               way == 1 ? "threads" : "flushing");
                        failures++;
                    }
                }
            }
            for (int64_t i = 0; i < count; i++) free(first[i]);
        }
        for (int64_t i = 0; i < count; i++) {
            if (a[i].kind == OUTPUT) {
                free(a[i].data);
                free(a[i].wanted);
            }
        }
        while (owned_count) free(owned[--owned_count]);
    }
    printf("best %s, threads %d, %d calls, %d failures\n", dsm_isa_name(dsm_isa_best()), dsm_has_threads(), calls,
           failures);
    return failures != 0;
}
