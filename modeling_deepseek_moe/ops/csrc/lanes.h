/* Tasks of a parallel region. Each thread takes a run of neighbouring tasks, one by one, and when it has none left, those
   of the others: neighbours lie next to each other in memory, which is read a seventh faster in runs than in turns, and
   a thread that is held up delays no other. */
#ifndef DSM_LANES_H
#define DSM_LANES_H

#include "engine.h"

#if defined(_OPENMP)
#include <omp.h>
DSM_INLINE int dsm_me(void) { return omp_get_thread_num(); }
#else
DSM_INLINE int dsm_me(void) { return 0; }
#endif

typedef struct {
    int64_t next, end;
    char apart[48]; /* a cache line each */
} Lane;

/* `tasks` tasks for `threads` threads; NULL without memory; free() releases them */
DSM_INLINE Lane *dsm_lanes(int threads, int64_t tasks) {
    Lane *lanes = dsm_alloc(sizeof(Lane) * threads);
    for (int i = 0; lanes && i < threads; i++) {
        lanes[i].next = tasks * i / threads;
        lanes[i].end = tasks * (i + 1) / threads;
    }
    return lanes;
}

/* the next task for thread `me`, -1 when there is none */
DSM_INLINE int64_t dsm_take(Lane *lanes, int threads, int me) {
    for (int i = 0; i < threads; i++) {
        Lane *lane = lanes + (me + i) % threads;
        if (__atomic_load_n(&lane->next, __ATOMIC_RELAXED) >= lane->end) continue;
        const int64_t task = __atomic_fetch_add(&lane->next, 1, __ATOMIC_RELAXED);
        if (task < lane->end) return task;
    }
    return -1;
}

#endif
