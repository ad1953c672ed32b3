// What every kernel sees: the worker that runs it, the step it runs, and how work is shared out.
#pragma once
#include <stdatomic.h>
#include <string.h>
#include "api.h"
#include "blocks.h"

enum { TILE_ROWS = 16 };                // rows interleaved in the R16 layout
enum { SMALL_COLS = PYG_SMALL_COLS };
enum { LINE = 64 };                     // bytes that come from memory together, and a vector line of R16

typedef struct {                        // the activations this worker prepared last (see kernels/act.h)
    int32_t id;                         // step attribute ACT_ID they were prepared for; -1 none
    int32_t format;
    char   *data;                       // plan->act_bytes of private memory
} act_cache;

typedef struct worker {
    const pyg_plan *plan;
    pyg_pool       *pool;
    struct worker  *team;               // all workers of the pool: a kernel may share worker 0's scratch between its barriers
    int             ith, nth;
    int             step;               // index of the running step
    char           *memory;             // private: claims, act_bytes for prepared activations, scratch
    size_t          memory_bytes;
    char           *scratch;
    _Atomic int64_t *claims;            // how many of this worker's own chunks are taken, of each step in each phase
    act_cache       act;
} worker;

typedef void kernel_fn(worker *w, const pyg_step *s);
typedef int64_t scratch_fn(const pyg_plan *plan, const pyg_step *s);

static inline const pyg_view *view_of(const worker *w, int32_t index) { return index < 0 ? NULL : &w->plan->views[index]; }
static inline char *row_at(const pyg_view *v, int64_t i1, int64_t i2, int64_t i3) {
    return v->data + i1 * v->nb[1] + i2 * v->nb[2] + i3 * v->nb[3];
}

// The next of the running step's `chunks`, or a number past every count where none is left or the run is aborted. Each is handed out once.
// A worker takes those of its own share first: it then meets the same weights in every run, in its own caches, and counts on a cache
// line of its own. After them it helps the others. A kernel that works in two phases with a barrier between them counts the second
// one's chunks with claim_again.
enum { CLAIM_PHASES = 2 };
static inline int64_t claim_of(worker *w, int phase, int64_t chunks) {
    if (w->plan->abort && *w->plan->abort) return INT64_MAX;
    for (int k = 0; k < w->nth; k++) {
        const int owner = (w->ith + k) % w->nth;
        const int64_t first = chunks * owner / w->nth, share = chunks * (owner + 1) / w->nth - first;
        _Atomic int64_t *taken = &w->team[owner].claims[CLAIM_PHASES * w->step + phase];
        if (atomic_load_explicit(taken, memory_order_relaxed) >= share) continue;
        const int64_t i = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (i < share) return first + i;
    }
    return INT64_MAX;
}
static inline int64_t claim(worker *w, int64_t chunks) { return claim_of(w, 0, chunks); }
static inline int64_t claim_again(worker *w, int64_t chunks) { return claim_of(w, 1, chunks); }

// All workers meet here; used by pool.c between steps and by kernels that work in phases.
void pool_barrier(worker *w);

// ---- what the steps mean -------------------------------------------------------------------------------------------------------
// Shapes in numpy order (rows last-but-one, contiguous dimension last). T tokens, all floats F32 unless said.
// x(T, K) is a float view; where i[2] is 1 it is a buffer written by `prepare` instead. `norm` is an optional RMS norm of x.
//
//  get_rows        dst (T, D)            src table (V, D) any type, ids i32 (T)                        f scale
//  rms_norm        dst (.., D)           src x, weight (D)|-1, residual (.., D)|-1                     f eps
//  prepare         dst bytes             src x (T, K), norm|-1                                         i -, format    f eps
//  mul_mat         dst (T, M)            src W (M, K), x, norm|-1, bias (M)|-1, residual (T, M)|-1     i act_id, format, prepared   f eps, scale, softcap (0: none)
//  glu_mat         dst (T, M)            src Wgate, x, norm|-1, Wup, bias_gate|-1, bias_up|-1          i act_id, format, prepared, GLU_*   f eps
//  add, mul        dst (.., D)           src a, b (same shape, or one row that repeats)
//  scale           dst                   src a                                                         f factor
//  softcap         dst                   src a                                                         f cap         cap * tanh(a / cap)
//  glu             dst (.., D)           src gate, up                                                  i GLU_*
//  rope_table      dst (T, R/2, 2)       src pos i32 (T), inv_freq (R/2)                               f mscale      (cos, sin) * mscale
//  rope            dst (T, H, D)         src x (T, H, D), table                                        i ROPE_*, R   (dst may be x)
//  store           dst cache (Hk, C, D)  src x (T, Hk, D), cell i32 (T)                                              any cache type
//  attention       dst (T, H * D)        src q (T, H, D), K, V cache, cell, first i32 (T), sinks (H)|-1  i window, coarse, fixed      f scale, softcap
//                  sinks: a score of each head beside those of its cells, which takes its share of the weights and has no value
//                  token t sees the cells first[t] .. cell[t] (and within `window` of cell[t] when window > 0)
//                  fixed: 1 gives a token the same bits in any batch (attention_step does so for the sizes that it takes)
//                  coarse: 1 lets products be rounded to bf16, for plans that round activations to 8 bits anyway
//  attention_step  dst (T, H * D)        src q, K, V, cell, first, k (T, Hk, D), v (T, Hk, D), table|-1, sinks|-1   i window, ROPE_*, R, coarse   f scale, softcap
//                  T <= SMALL_COLS: rope q and k, store k and v, then attention, all in one step (q, k, v unroped)
//  moe_route       dst ids i32 (T, U)    src logits (T, E), weights (T, U) written                     i MOE_*, normalize   f scale
//  mul_mat_id      dst (T, U, M)         src W (E, M, K), x (T, K) or (T, U, K), norm|-1, ids, bias (E, M)|-1   i act_id, format  f eps
//  glu_mat_id      dst (T, U, M)         src Wgate (E, M, K), x (T, K), norm|-1, ids, Wup, bias_gate|-1, bias_up|-1   i act_id, format, 0, GLU_*  f eps
//  moe_sum         dst (T, M)            src y (T, U, M), weights (T, U), residual (T, M)|-1
//  peak            dst (C)               src bytes (C, n)                                              i PEAK_*    (in no plan: measures the machine)
enum { GLU_SILU, GLU_GELU, GLU_RELU, GLU_CLAMPED };       // CLAMPED: see vf_glu
enum { ROPE_NORM, ROPE_NEOX };               // pairs (2i, 2i + 1), or (i, i + R/2)
enum { MOE_SOFTMAX, MOE_SIGMOID };
enum { PEAK_INT8, PEAK_FLOAT, PEAK_READ, PEAK_BF16 };
// Prepared activations (kernels/act.h). For packed weights columns are interleaved: floats, int8 with a scale per 32, per 256.
// For raw weights each column is a row of ggml's own activation blocks, as in llama.cpp. PAIRS: int8 values in 16 bits, for spread tiles. For
// a matrix unit they are bf16, or a sum of two.
// A format (attribute of a step) is one of these for few columns, plus ACT_WIDE times one for many where that is another.
enum { ACT_F32, ACT_A32, ACT_A256, ACT_ROW_Q8_0, ACT_ROW_Q8_1, ACT_ROW_Q8_K, ACT_PAIRS32, ACT_PAIRS256, ACT_BF16 = PYG_ACT_BF16, ACT_BF16X2, ACT_WIDE = PYG_ACT_WIDE };

// ---- the table one ISA contributes -----------------------------------------------------------------------------------------
#define PYG_OPS(OP) \
    OP(get_rows) OP(rms_norm) OP(mul_mat) OP(glu_mat) OP(prepare) OP(add) OP(mul) OP(scale) OP(softcap) OP(glu) \
    OP(rope_table) OP(rope) OP(store) OP(attention) OP(attention_step) \
    OP(moe_route) OP(mul_mat_id) OP(glu_mat_id) OP(moe_sum) OP(peak)
enum {
#define OP(name) OP_##name,
    PYG_OPS(OP)
#undef OP
    N_OPS
};
enum { N_TYPES = 43 };

typedef struct {
    const char *isa;
    kernel_fn  *op[N_OPS];
    scratch_fn *scratch[N_OPS];         // private bytes a step needs; NULL: none
    // per tensor type, NULL where the type has no such kernel; n is a multiple of the block length
    void (*dequantize[N_TYPES])(int64_t n, const void *src, float *dst);
    void (*quantize[N_TYPES])(int64_t n, const float *src, void *dst, const float *importance);
    // many rows at once; search: for the least error that is found, otherwise ggml's choice of scales, which is what `quantize` gives;
    // 1 when there is no memory for a codebook
    int (*encode[N_TYPES])(int64_t rows, int64_t n, const float *src, void *dst, const float *importance, int search);
    char formula[N_TYPES];              // 1: `quantize` is a formula, which takes NaN and infinity too
    int (*finite)(int64_t n, const float *x);
    int (*quantize_finite[N_TYPES])(int64_t n, const float *src, void *dst);      // both at once
    float (*dot[N_TYPES])(int64_t n, const void *weights, const void *activations);   // activations in the type's activation type
    void (*stream)(int64_t bytes, const char *src, char *dst);                        // copies lines past the caches, to aligned ones
    int64_t (*row_bytes)(int type, int64_t n);
    int     (*act_format)(int type, int packed, int exact, int fixed);
    int     (*attends_in_bf16)(int64_t tokens, int fixed);
    int64_t (*act_bytes)(int format, int64_t k, int64_t cols);
    int64_t (*pack_bytes)(int type, int64_t rows, int64_t k);
} kernel_table;

extern const kernel_table *kernels;     // the selected ISA's
// What the processor likes, beyond its instruction set. fetch_streams: weights that come from memory are asked for ahead, in several streams at
// once (see kernels/tile.h): a core of Intel's reads 1.7 times as fast so (Sapphire Rapids), and models decode 7 to 20 % faster on AMD's before
// AVX-512 (Zen 3); Zen 4 reads at full speed by itself.
// slow_bf16: a vector's dot products of bf16 take longer than the same in floats (five times an FMA on Sapphire Rapids, once on Zen 4).
// fetch_stores: a store that finds its line in the first cache is a fifth faster where memory is the limit (Intel); on a Zen 3 asking for the
// line costs up to a fifth, and there stream_stores writes what no cache holds 1.25 to 1.7 times as fast.
extern int fetch_streams, slow_bf16, fetch_stores, stream_stores;

// Whether a worker claims its next chunk before it begins with one, to fetch from there at its end: where there are plenty to share out.
static inline int claims_early(const worker *w, int64_t chunks) { return fetch_streams && chunks >= 4 * w->nth; }
