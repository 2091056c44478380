/* Memory. Into pages that are new to the process activations are packed three times as slowly, so the buffers that
   a product of many tokens needs are not returned to the system one call, to be asked for again the next. */
#include "engine.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { HUGE_PAGE = 2 << 20, MOST_KEPT = 32 << 20, SLOTS = 3 };

/* Large buffers lie on huge pages where there are some: they are crossed with long strides. */
void *dsm_alloc(size_t bytes) {
    const size_t grain = bytes < HUGE_PAGE ? 64 : HUGE_PAGE, room = (bytes + 63) / 64 * 64 + 64;
    void *memory = aligned_alloc(grain, (room + grain - 1) / grain * grain);
#if defined(__linux__)
    if (memory && grain == HUGE_PAGE) madvise(memory, room, MADV_HUGEPAGE);
#endif
    return memory;
}

typedef struct {
    size_t bytes;
    char apart[56];
} Buffer; /* what was asked for follows */

static Buffer *idle[SLOTS]; /* taken and left by exchange, so threads need no lock */

void *dsm_borrow(size_t bytes) {
    for (int i = 0; i < SLOTS && bytes >= HUGE_PAGE; i++) {
        Buffer *kept = __atomic_exchange_n(&idle[i], NULL, __ATOMIC_ACQ_REL);
        if (kept && kept->bytes >= bytes) return kept + 1;
        if (kept) kept = __atomic_exchange_n(&idle[i], kept, __ATOMIC_ACQ_REL);
        free(kept); /* what another thread left there meanwhile */
    }
    Buffer *made = dsm_alloc(sizeof(Buffer) + bytes);
    if (!made) return NULL;
    made->bytes = bytes;
    return made + 1;
}
void dsm_give_back(void *memory) {
    if (!memory) return;
    Buffer *buffer = (Buffer *)memory - 1;
    if (buffer->bytes >= HUGE_PAGE && buffer->bytes <= MOST_KEPT) /* the one that is idle for longest leaves */
        for (int i = 0; i < SLOTS && buffer; i++) buffer = __atomic_exchange_n(&idle[i], buffer, __ATOMIC_ACQ_REL);
    free(buffer);
}
