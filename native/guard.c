// Files that are cut while they are mapped. Touching a page that the file has no more raises SIGBUS, which ends the process; for the
// mappings that are watched, a handler puts zeros in the place of what is missing and remembers it, so that the reader goes on and
// can say afterwards what happened. Signals that concern other memory go to the handler that was there before (Python's faulthandler,
// a sanitizer's), or do what they would have done.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>
#include "api.h"

enum { WATCHED = 4096 };
typedef struct { _Atomic uintptr_t start, end; atomic_int lost; } range;       // end 0: a free place

static range ranges[WATCHED];
static atomic_int used;                                                         // places that were ever taken
static uintptr_t page;
static struct sigaction before;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// Only what is safe in a signal handler: atomics and one system call.
static int replaced(uintptr_t at) {
    for (int i = 0; i < atomic_load(&used); i++) {
        uintptr_t start = atomic_load(&ranges[i].start), end = atomic_load(&ranges[i].end);
        if (at < start || at >= end) continue;
        // what follows a missing page is missing too: one call for all of it
        if (mmap((void *)at, end - at, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) return 0;
        atomic_store(&ranges[i].lost, 1);
        return 1;
    }
    return 0;
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
    int saved = errno;
    int done = info->si_code == BUS_ADRERR && replaced((uintptr_t)info->si_addr & ~(page - 1));
    errno = saved;
    if (done) return;
    if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
    else if (before.sa_handler == SIG_IGN && info->si_code <= 0) return;        // sent by a process, and nobody minds
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) before.sa_handler(number);
    else {
        signal(number, SIG_DFL);
        if (info->si_code <= 0) raise(number);                                  // else the access is repeated, and ends the process
    }
}

static int installed(void) {
    struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (sigaction(SIGBUS, NULL, &now)) return 0;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return 1;
    before = now;
    ours.sa_sigaction = on_bus_error;
    sigemptyset(&ours.sa_mask);
    return !sigaction(SIGBUS, &ours, NULL);
}

int pyg_guard_watch(const void *start, size_t bytes) {
    pthread_mutex_lock(&mutex);
    page = sysconf(_SC_PAGESIZE);
    int i = 0;
    while (i < WATCHED && atomic_load(&ranges[i].end)) i++;
    if (i == WATCHED || !installed()) i = -1;
    else {
        atomic_store(&ranges[i].lost, 0);
        atomic_store(&ranges[i].start, (uintptr_t)start);
        atomic_store(&ranges[i].end, ((uintptr_t)start + bytes + page - 1) & ~(page - 1));
        if (i >= atomic_load(&used)) atomic_store(&used, i + 1);
    }
    pthread_mutex_unlock(&mutex);
    return i;
}

int pyg_guard_lost(int watch) { return atomic_load(&ranges[watch].lost); }

void pyg_guard_forget(int watch) { atomic_store(&ranges[watch].end, 0); }
