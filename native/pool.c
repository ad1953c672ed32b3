// The persistent thread pool and the loop that walks a plan.
//
// A run is one generation: the caller is worker 0, bumps `generation`, and every worker walks the whole step list.
// Waiting spins briefly (the common case: the others are microseconds away) and then parks on a futex, so that a
// second busy program, or a machine whose two vCPUs share a core, does not lose its processor to a spinning wait.
#define _GNU_SOURCE
#include "engine.h"
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <limits.h>
#endif

enum { CACHE_LINE = 64 };
// How long a wait spins before it parks, and how often it looks at the clock. A small model's next run is worth waiting for while Python
// chooses a token and writes text: waking up would take as long as a part of the run.
enum { SPIN_NS = 30000, SPINS_PER_LOOK = 32, SHORT_RUN_NS = 2000000, SPIN_AFTER_SHORT_RUN_NS = 200000 };

typedef struct { _Alignas(CACHE_LINE) atomic_int value; atomic_int sleepers; } gate;   // a number that waiters wait to change

struct pyg_pool {
    int n_threads;
    pthread_t *threads;
    worker *workers;
    const pyg_plan *plan;
    gate generation;            // bumped to start a run (or to quit)
    gate phase;                 // bumped by the last worker to arrive at a barrier
    gate finished;              // bumped by each helper that has left the run
    _Alignas(CACHE_LINE) atomic_int arrived;
    _Atomic int64_t barriers;
    int quit;
#ifndef __linux__
    pthread_mutex_t mutex;
    pthread_cond_t changed;
#endif
};

static inline void relax(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void gate_wait(pyg_pool *pool, gate *g, int old, int64_t spin_ns) {
    int64_t since = 0;                  // by the clock: a pause takes from 10 to 150 cycles, as the processor likes
    for (int i = 1;; i++) {
        if (atomic_load_explicit(&g->value, memory_order_acquire) != old) return;
        relax();
        if (i % SPINS_PER_LOOK) continue;
        int64_t now = now_ns();
        if (!since) since = now;
        else if (now - since > spin_ns) break;
    }
    atomic_fetch_add(&g->sleepers, 1);
#ifdef __linux__
    (void)pool;
    while (atomic_load(&g->value) == old) syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
    pthread_mutex_lock(&pool->mutex);
    while (atomic_load(&g->value) == old) pthread_cond_wait(&pool->changed, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
#endif
    atomic_fetch_sub(&g->sleepers, 1);
}

static void gate_bump(pyg_pool *pool, gate *g) {
    atomic_fetch_add(&g->value, 1);
    if (atomic_load(&g->sleepers) == 0) return;
#ifdef __linux__
    (void)pool;
    syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
#endif
}

void pool_barrier(worker *w) {
    pyg_pool *pool = w->pool;
    if (w->nth == 1) {
        atomic_fetch_add_explicit(&pool->barriers, 1, memory_order_relaxed);
        return;
    }
    int phase = atomic_load_explicit(&pool->phase.value, memory_order_acquire);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == w->nth - 1) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&pool->barriers, 1, memory_order_relaxed);
        gate_bump(pool, &pool->phase);
    } else {
        gate_wait(pool, &pool->phase, phase, SPIN_NS);
    }
}

// Every worker walks every step; the steps share work out through claim(). A step marked `sync` waits for all before it.
static void walk(worker *w) {
    const pyg_plan *plan = w->plan;
    w->act.id = -1;
    for (int k = 0; k < plan->n_steps; k++) {
        const pyg_step *s = &plan->steps[k];
        if (s->sync || plan->step_ns) pool_barrier(w);
        // an abort seen by one worker is seen by all at the latest at the end: claim() hands out nothing more
        int64_t start = plan->step_ns && w->ith == 0 ? now_ns() : 0;
        w->step = k;
        kernels->op[s->op](w, s);
        if (plan->step_ns) {
            pool_barrier(w);
            if (w->ith == 0) plan->step_ns[k] += now_ns() - start;
        }
    }
}

static void *helper(void *arg) {
    worker *w = arg;
    pyg_pool *pool = w->pool;
    int64_t spin = SPIN_NS;
    for (int seen = 0;; seen++) {
        gate_wait(pool, &pool->generation, seen, spin);
        if (pool->quit) return NULL;
        w->plan = pool->plan;
        const int64_t start = now_ns();
        walk(w);
        gate_bump(pool, &pool->finished);
        spin = now_ns() - start < SHORT_RUN_NS ? SPIN_AFTER_SHORT_RUN_NS : SPIN_NS;
    }
}

pyg_pool *pyg_pool_new(int n_threads) {
    if (n_threads < 1) n_threads = 1;
    pyg_pool *pool = aligned_alloc(CACHE_LINE, (sizeof(pyg_pool) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->workers = calloc(n_threads, sizeof(worker));
    pool->threads = calloc(n_threads, sizeof(pthread_t));
#ifndef __linux__
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, NULL);
#endif
    if (!pool->workers || !pool->threads) { pyg_pool_free(pool); return NULL; }
    for (int i = 0; i < n_threads; i++) {
        worker *w = &pool->workers[i];
        w->pool = pool;
        w->team = pool->workers;
        w->ith = i;
        w->nth = n_threads;
        if (i > 0 && pthread_create(&pool->threads[i], NULL, helper, w)) { pyg_pool_free(pool); return NULL; }
        pool->n_threads = i + 1;
    }
    return pool;
}

void pyg_pool_free(pyg_pool *pool) {
    if (!pool) return;
    pool->quit = 1;
    gate_bump(pool, &pool->generation);
    for (int i = 1; i < pool->n_threads; i++) pthread_join(pool->threads[i], NULL);
    for (int i = 0; pool->workers && i < pool->n_threads; i++) pyg_arena_free(pool->workers[i].memory, pool->workers[i].memory_bytes);
    free(pool->workers);
    free(pool->threads);
    free(pool);
}

int pyg_pool_threads(const pyg_pool *pool) { return pool->n_threads; }
int64_t pyg_barriers(const pyg_pool *pool) { return pool->barriers; }

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

void pyg_plan_sizes(pyg_plan *plan) {
    plan->act_bytes = plan->scratch = 64;
    for (int k = 0; k < plan->n_steps; k++) {
        const pyg_step *s = &plan->steps[k];
        scratch_fn *need = kernels->scratch[s->op];
        if (need) plan->scratch = max64(plan->scratch, need(plan, s));
        int small_matmul = (s->op == OP_mul_mat || s->op == OP_glu_mat) && !s->i[2];
        if (small_matmul) {
            const pyg_view *x = &plan->views[s->src[1]];
            plan->act_bytes = max64(plan->act_bytes, kernels->act_bytes(s->i[1], x->ne[0], x->ne[1]));
        }
    }
    plan->act_bytes = (plan->act_bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

int pyg_run(pyg_pool *pool, const pyg_plan *plan) {
    const size_t counters = CLAIM_PHASES * plan->n_steps * sizeof(int64_t), claims = (counters + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    for (int i = 0; i < pool->n_threads; i++) {           // grows only when a plan with a larger need first runs
        worker *w = &pool->workers[i];
        size_t need = claims + plan->act_bytes + plan->scratch;
        if (w->memory_bytes < need) {
            pyg_arena_free(w->memory, w->memory_bytes);
            w->memory = pyg_arena_new(need);
            w->memory_bytes = w->memory ? need : 0;
            if (!w->memory) return 2;
        }
        w->claims = (_Atomic int64_t *)w->memory;
        memset(w->memory, 0, counters);
        w->act.data = w->memory + claims;
        w->scratch = w->act.data + plan->act_bytes;
    }
    for (int i = 0; i < plan->n_views; i++) {
        pyg_view *v = &plan->views[i];
        if (v->slot >= 0) v->ne[v->slot_dim] = plan->slots[v->slot];
    }
    pool->plan = plan;
    pool->workers[0].plan = plan;
    pool->workers[0].nth = plan->alone ? 1 : pool->n_threads;
    if (plan->alone) {
        walk(&pool->workers[0]);
        return plan->abort && *plan->abort ? 1 : 0;
    }
    int finished = atomic_load(&pool->finished.value);
    gate_bump(pool, &pool->generation);
    walk(&pool->workers[0]);
    int seen;
    while ((seen = atomic_load_explicit(&pool->finished.value, memory_order_acquire)) - finished < pool->n_threads - 1)
        gate_wait(pool, &pool->finished, seen, SPIN_NS);
    return plan->abort && *plan->abort ? 1 : 0;
}
