// What Python sees of the native code: cffi parses this file (preprocessor lines removed) after blocks.h.
// Nothing here allocates per token, and nothing here validates input from outside: sizes are checked in Python first.
#pragma once
#include <stdint.h>
#include <stddef.h>

// ---- ISA: one kernel table per instruction set, chosen once per process -----------------------------------------------
int         pyg_isa_count(void);
const char *pyg_isa_name(int isa);
int         pyg_isa_supported(int isa);        // CPUID and XGETBV: 1 when this machine can run it
void        pyg_isa_select(int isa);           // every later call uses this table
int         pyg_op_count(void);
const char *pyg_op_name(int op);               // names match the op table of pyggml/ops
const char *pyg_compiler(void);

enum { PYG_SMALL_COLS = 8 };     // up to this many columns a matmul prepares its activations privately, without a barrier
enum { PYG_ACT_WIDE = 16, PYG_WIDE_COLS = 32 };      // an activation format modulo this tells how few columns are prepared, 0: as floats;
enum { PYG_ACT_BF16 = 8 };                           // over it, how more columns than that are; from this on a matrix unit multiplies bf16

// ---- A tensor as kernels see it --------------------------------------------------------------------------------------------
// Dimensions in ggml order: ne[0] is the contiguous one, nb[i] is the distance in bytes between neighbours in dimension i.
// numpy shape (a, b, c) is ne = {c, b, a, 1}.
typedef struct {
    char    *data;          // first byte; for a weight the blocks as they lie in the GGUF file
    int64_t  ne[4];
    int64_t  nb[4];
    int32_t  type;          // ggml tensor type id
    int32_t  slot;          // >= 0: at run time ne[slot_dim] = slots[slot]
    int32_t  slot_dim;
    int32_t  release;       // 1: once a 16-row tile is packed, the pages behind data may be given back
    char    *packed;        // R16 tiles of this weight (see kernels/pack.h), or NULL: compute from data
    uint8_t *ready;         // one byte per 16-row tile of `packed`: 0 not packed yet
} pyg_view;

// One step of a plan. Views are named by index; -1 means absent. The meaning of src, i and f is the op's (see kernels/).
typedef struct {
    int32_t op;
    int32_t sync;           // 1: every earlier step must be complete before this one starts (a barrier)
    int32_t dst;
    int32_t src[9];
    int32_t i[8];
    float   f[8];
} pyg_step;

typedef struct {
    pyg_view *views;
    int32_t   n_views;
    int32_t   n_steps;
    pyg_step *steps;
    int32_t  *slots;        // run-time values: number of tokens, number of output rows, ...
    int64_t  *step_ns;      // NULL, or n_steps: time spent per step is added here (a barrier then follows each step)
    volatile int32_t *abort;// set to 1 from any thread: the run stops at the next chunk
    int32_t   alone;        // 1: the caller computes this plan by itself, the pool keeps sleeping
    int64_t   act_bytes;    // private memory a worker needs for prepared activations (filled in by pyg_plan_sizes)
    int64_t   scratch;      // private memory a worker needs beside it (likewise)
} pyg_plan;

typedef struct pyg_pool pyg_pool;
pyg_pool *pyg_pool_new(int n_threads);                     // NULL: no memory or no threads
void      pyg_pool_free(pyg_pool *pool);
void      pyg_plan_sizes(pyg_plan *plan);                  // with every ne at its largest: act_bytes and scratch
int       pyg_pool_threads(const pyg_pool *pool);
int       pyg_run(pyg_pool *pool, const pyg_plan *plan);   // 0 done, 1 aborted, 2 no scratch memory
int64_t   pyg_barriers(const pyg_pool *pool);              // barriers passed since the pool was made

// ---- Memory ------------------------------------------------------------------------------------------------------------------
char *pyg_arena_new(size_t bytes);                         // zeroed, 2 MB aligned, huge pages asked for; NULL: no memory
void  pyg_arena_free(char *arena, size_t bytes);
int   pyg_lock(char *start, size_t bytes);                 // keep these pages in memory once they are touched; 0 or an errno

// ---- What the planner asks about weights and activations (kernels/act.h, kernels/pack.h) --------------------------------------
// exact: 1 as floats, 0 as ggml rounds them, or as a matrix unit takes them; fixed: 1 the same rounding for any number of columns
int     pyg_act_format(int type, int packed, int exact, int fixed);    // how activations are prepared for weights of `type`
int     pyg_attends_in_bf16(int64_t tokens, int fixed);                // whether attention rounds so many tokens to bf16, where it may
int64_t pyg_act_bytes(int format, int64_t k, int64_t cols);// bytes of `cols` prepared columns of length k
int64_t pyg_pack_bytes(int type, int64_t rows, int64_t k); // bytes of the R16 form of a weight; 0: this type has none

// ---- Codecs: rows of one type, n weights (a multiple of the block); 0 done, 1 this type has no such kernel -------------------
// checked: 1 looks at the weights, and 2 is returned when one is not finite (what is written then is worth nothing)
// stream: 1 writes past the caches what those would not hold, where the processor gains by it (pyg_streams_stores)
int pyg_dequantize(int type, int64_t n, const void *src, float *dst, int stream);
int pyg_quantize(int type, int64_t n_rows, int64_t n_per_row, const float *src, void *dst, const float *importance, int search, int checked,
                 int stream);
int pyg_streams_stores(void);
int pyg_dot(int type, int64_t n, const void *weights, const void *activations, float *result);

// ---- Text to tokens (tokenize.c): a table of texts, and merging by score (SPM) or by rank (BPE) -------------------------------
typedef struct pyg_table pyg_table;
typedef struct pyg_merger pyg_merger;
// n texts, the i-th at bytes[offsets[i] + prefix .. offsets[i + 1]]; byte_level: spelled in GPT-2's byte alphabet. NULL: no memory.
// *duplicate: the first id whose text an earlier one has, or -1.
pyg_table  *pyg_table_new(const char *bytes, const int64_t *offsets, int64_t prefix, int32_t n, int byte_level, int32_t *duplicate);
void        pyg_table_free(pyg_table *table);
int32_t     pyg_table_find(const pyg_table *table, const char *text, int64_t n);                       // id or -1
// A merger refers to its table, which must outlive it. fallback[256]: the token of a byte that is in no token, or -1.
// whole_words: which words that are tokens are those tokens, whatever the merges say.
enum { WHOLE_NEVER, WHOLE_ALWAYS, WHOLE_NEWLINES };
pyg_merger *pyg_merger_spm(const pyg_table *table, const float *scores, const int32_t *fallback);
pyg_merger *pyg_merger_bpe(pyg_table *table, const char *bytes, const int64_t *offsets, int64_t prefix, int32_t n_merges, int byte_level,
                           int whole_words, const int32_t *fallback);                                  // merges: "left right", best first
void        pyg_merger_free(pyg_merger *merger);
// ids has room for n. BPE: words are lengths in characters of UTF-8 text; SPM finds its words itself. Ids written, or -1: no memory.
int64_t     pyg_merge(const pyg_merger *merger, const char *text, int64_t n, const int32_t *words, int64_t n_words, int32_t *ids);

// ---- The next token (draw.c) --------------------------------------------------------------------------------------------------------
// Of logits[0 .. n) the top_k largest, of those the likeliest that together have probability top_p, of those all that are at least min_p
// times as likely as the first (in both steps min_keep at least); the one that u in [0, 1) falls on at temperature `temp`.
// -1: one is NaN, or the largest is not finite.
enum { PYG_MOST_TOP_K = 256 };
int32_t pyg_draw(const float *logits, int32_t n, int32_t top_k, float top_p, float min_p, int32_t min_keep, float temp, double u);

// ---- Metadata: `count` strings, each a length (8 bytes, or 4 when !wide; byte-swapped when swap) and its bytes ------------------
// Starts at data[pos]; nothing at or past data[end] is read. starts: NULL, or count + 1 positions of the length fields and of the end.
// Returns the position after the last string, or -1 - position of the first one that is longer than `limit` or does not fit.
int64_t pyg_scan_strings(const uint8_t *data, int64_t pos, int64_t end, int64_t count, int wide, int swap, int64_t limit, int64_t *starts);

// ---- XXH64 over bytes that come in pieces ------------------------------------------------------------------------------------------
typedef struct {
    uint64_t lanes[4];
    uint64_t seed;
    uint64_t total;             // bytes so far
    uint8_t  rest[32];          // the last total % 32 of them
} pyg_xxh64;
void     pyg_xxh64_start(pyg_xxh64 *h, uint64_t seed);
void     pyg_xxh64_add(pyg_xxh64 *h, const uint8_t *data, int64_t n);
uint64_t pyg_xxh64_end(const pyg_xxh64 *h);

// ---- Files that are cut while they are mapped (guard.c): what is missing reads as zeros, and the process lives ----------------------
int  pyg_guard_watch(const void *start, size_t bytes);     // a number for the calls below, or -1: too many, or no handler
int  pyg_guard_lost(int watch);                            // 1 once a part was touched that is not there any more
void pyg_guard_forget(int watch);                          // after the mapping has gone
