// The memory that weights and the workers' scratch live in: huge pages where there is enough of it.
#define _GNU_SOURCE
#include "api.h"
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20 };

char *pyg_arena_new(size_t bytes) {
    if (bytes == 0) bytes = 1;
    if (bytes < HUGE_PAGE) {                        // small buffers: plain pages, a huge page would waste memory
        char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    // ask for one huge page more than needed, keep the aligned middle, give the ends back
    size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char *p = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return NULL;
    char *start = (char *)(((uintptr_t)p + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    if (start > p) munmap(p, start - p);
    if (start + size < p + size + HUGE_PAGE) munmap(start + size, p + size + HUGE_PAGE - (start + size));
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);
#endif
    return start;
}

int pyg_lock(char *start, size_t bytes) {
    const uintptr_t page = sysconf(_SC_PAGESIZE), first = (uintptr_t)start / page * page;
    const size_t size = (uintptr_t)start + bytes - first;
#ifdef MLOCK_ONFAULT
    if (!mlock2((void *)first, size, MLOCK_ONFAULT)) return 0;
    if (errno != ENOSYS && errno != EINVAL) return errno;               // a kernel before 4.4 has only the other one
#endif
    return mlock((void *)first, size) ? errno : 0;
}

void pyg_arena_free(char *arena, size_t bytes) {
    if (!arena) return;
    if (bytes == 0) bytes = 1;
    munmap(arena, bytes < HUGE_PAGE ? bytes : (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}
