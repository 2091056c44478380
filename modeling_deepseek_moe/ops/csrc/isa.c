/* Which instruction sets this CPU has, and threads. */
#include "engine.h"

#include <pthread.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if DSM_AMX && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const Kernels dsm_kernels_baseline;
#if defined(__x86_64__)
extern const Kernels dsm_kernels_avx2, dsm_kernels_avx2_by_integers, dsm_kernels_avx512,
    dsm_kernels_avx512_by_integers, dsm_kernels_avx512_bf16, dsm_kernels_amx;
#if DSM_AMX
#define WITH_BF16 &dsm_kernels_avx512_bf16, &dsm_kernels_amx
#else
#define WITH_BF16 &dsm_kernels_avx512_bf16
#endif
static const Kernels *const LEVELS[] = {&dsm_kernels_baseline, &dsm_kernels_avx2, &dsm_kernels_avx512, WITH_BF16};
/* for bf16 activations */
static const Kernels *const OF_BF16[] = {&dsm_kernels_baseline, &dsm_kernels_avx2_by_integers,
                                         &dsm_kernels_avx512_by_integers, WITH_BF16};
#else
static const Kernels *const LEVELS[] = {&dsm_kernels_baseline}, *const *const OF_BF16 = LEVELS;
#endif
enum { COUNT = sizeof LEVELS / sizeof *LEVELS };

#if defined(__x86_64__)
/* Only newer compilers' `__builtin_cpu_supports` knows these two by name. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
static int has_avx512_bf16(void) { /* and avx512_vnni */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && c >> 11 & 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
           a >> 5 & 1;
}
/* Linux hands out the tiles' state, 8 kB a thread, to processes that ask for it. */
static int has_amx(void) {
#if DSM_AMX && defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1) || !(c >> 8 & 1))
        return 0; /* amx-tile, amx-bf16, gfni */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

DSM_API int dsm_version(void) { return DSM_VERSION; }

static int find_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return 1;
    if (!(__builtin_cpu_supports("avx512vbmi") && has_avx512_bf16())) return 2;
    return has_amx() ? 4 : 3;
#else
    return 0;
#endif
}

/* The highest level that this CPU can run. Asked once: a virtual machine takes microseconds over each `cpuid`. */
DSM_API int dsm_isa_best(void) {
    static int found; /* the level + 1; threads that ask at the same time find the same */
    int best = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (!best) {
        best = find_best() + 1;
        __atomic_store_n(&found, best, __ATOMIC_RELAXED);
    }
    return best - 1;
}

/* The name of a level, NULL past the last. */
DSM_API const char *dsm_isa_name(int isa) { return isa >= 0 && isa < COUNT ? LEVELS[isa]->name : NULL; }

const Kernels *dsm_kernels(int isa, int activation_dtype) {
    int best = dsm_isa_best();
    if (isa < 0 || isa > best) isa = best;
    while (isa > 0 && activation_dtype != DSM_BF16 && LEVELS[isa]->packed_bytes < 4) isa--;
    return (activation_dtype == DSM_BF16 ? OF_BF16 : LEVELS)[isa];
}

/* Whether the extension was built with OpenMP. */
DSM_API int dsm_has_threads(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* Set in the child of a fork: the parent's OpenMP threads do not exist there, and waiting for them never ends. */
static int forked;
static void after_fork(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

int dsm_threads(int wanted, int64_t weight_bytes) {
    int64_t useful = 1 + weight_bytes / (128 << 10); /* waking a thread costs what reading about this much does */
    if (forked || wanted < 1) return 1;
    return (int)dsm_min(wanted, useful);
}
