// The matmul driver: which tiles of which weight meet which columns, in what order, by whom.
//
// A chunk is a group of row tiles x a block of column tiles. Column blocks run fastest, so a weight comes from memory once per
// batch and from the cache afterwards. With a packed weight the tile is where it lies (packed on first touch); otherwise a
// worker makes it in its scratch memory, once per chunk.
#pragma once
#include <sched.h>
#include <sys/mman.h>

enum { COLUMN_BLOCK = 8 };                       // column tiles in a chunk: 64 columns of activations stay in the L2 cache
enum { CHUNK_BYTES = 128 << 10, CHUNK_MIN_BYTES = 16 << 10 };      // of weights: worth a claim; small enough to balance

typedef struct {                                 // one matrix of (rows, k): a weight, or one expert's part of it
    const char *raw;                             // its first row in the file
    char *packed;                                // its tiles, or NULL
    _Atomic uint8_t *ready;                      // TILE_* per tile
    int64_t rows, k, row_stride, tiles, bytes;   // bytes: of a tile
    int type, tile, release;                     // ggml type; type of the tiles
} matrix;

static matrix matrix_of(const pyg_view *v, int64_t expert, int layout) {
    int64_t tiles = tile_count(v->ne[1]);
    int type = v->type, tile = layout == ACT_F32 && TILE_TYPES[type].block != 1 ? TYPE_F32 : type;
    int64_t bytes = tile_bytes(tile, v->ne[0]);
    return (matrix){
        .raw = row_at(v, 0, expert, 0), .packed = v->packed ? v->packed + expert * tiles * bytes : NULL,
        .ready = (_Atomic uint8_t *)(v->ready + (v->packed ? expert * tiles : 0)),
        .rows = v->ne[1], .k = v->ne[0], .row_stride = v->nb[1], .tiles = tiles, .bytes = bytes, .type = type, .tile = tile, .release = v->release,
    };
}

// ---- tiles: packed on first touch, or made in scratch ----------------------------------------------------------------------------
enum { TILE_RAW, TILE_BUSY, TILE_READY };

static int tile_rows(const matrix *m, int64_t tile) {
    int64_t left = m->rows - tile * TILE_ROWS;
    return left < TILE_ROWS ? (int)left : TILE_ROWS;
}

// Gives back the file's pages behind tiles [first, last), as far as no unpacked neighbour lives on them. Mapping a page in maps
// its surroundings too, so the packed tiles just before are given back once more.
static void release_pages(const matrix *m, int64_t first, int64_t last) {
    const uintptr_t page = 4096, around = 64 << 10;
    const int64_t tile = m->row_stride * TILE_ROWS, size = m->row_stride * m->rows;
    uintptr_t base = (uintptr_t)m->raw, low = base + first * tile;
    while (first > 0 && base + first * tile + around > low && atomic_load_explicit(&m->ready[first - 1], memory_order_relaxed) == TILE_READY) first--;
    while (last < m->tiles && atomic_load_explicit(&m->ready[last], memory_order_relaxed) == TILE_READY && (last * tile) % page) last++;
    uintptr_t start = (base + first * tile + page - 1) / page * page;
    uintptr_t end = (base + (last * tile < size ? last * tile : size)) / page * page;
    if (start < end) madvise((void *)start, end - start, MADV_DONTNEED);
}

static void pack_tiles(const matrix *m, int64_t first, int64_t last) {
    int packed = 0;
    for (int64_t t = first; t < last; t++) {
        uint8_t state = atomic_load_explicit(&m->ready[t], memory_order_acquire);
        if (state == TILE_READY) continue;
        if (state == TILE_RAW && atomic_compare_exchange_strong(&m->ready[t], &state, TILE_BUSY)) {
            PACKERS[m->type](m->raw + t * TILE_ROWS * m->row_stride, m->row_stride, tile_rows(m, t), m->k, m->packed + t * m->bytes);
            atomic_store_explicit(&m->ready[t], TILE_READY, memory_order_release);
            packed = 1;
        } else {
            while (atomic_load_explicit(&m->ready[t], memory_order_acquire) != TILE_READY) sched_yield();    // microseconds
        }
    }
    if (packed && m->release) release_pages(m, first, last);
}

// Dequantized rows as a tile of floats: [k][16], by way of one row at a time.
static void float_tile(const matrix *m, int64_t tile, float *out, float *row) {
    int rows = tile_rows(m, tile);
    for (int r = 0; r < TILE_ROWS; r++) {
        if (r < rows) kernels->dequantize[m->type](m->k, m->raw + (tile * TILE_ROWS + r) * m->row_stride, row);
        else memset(row, 0, m->k * sizeof(float));
        for (int64_t i = 0; i < m->k; i++) out[i * TILE_ROWS + r] = row[i];
    }
}

static const char *tile_at(const matrix *m, int64_t tile, char *scratch) {
    if (m->packed) return m->packed + tile * m->bytes;
    if (m->tile == m->type) PACKERS[m->type](m->raw + tile * TILE_ROWS * m->row_stride, m->row_stride, tile_rows(m, tile), m->k, scratch);
    else float_tile(m, tile, (float *)scratch, (float *)(scratch + m->bytes));
    return scratch;
}

// Scratch for one tile of a weight that is not packed.
static int64_t tile_scratch(const pyg_view *w, int format) {
    if (w->packed) return 0;
    int tile = format == ACT_F32 ? TYPE_F32 : w->type;
    return tile_bytes(tile, w->ne[0]) + w->ne[0] * (int64_t)sizeof(float) + LINE;
}

// ---- chunks ------------------------------------------------------------------------------------------------------------------------
typedef struct { int64_t group, groups, block, blocks; } chunking;        // row tiles per group, column tiles per block, and how many

static int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static chunking chunks_of(const worker *w, int64_t tiles, int64_t bytes, int64_t cols) {
    chunking c = {.block = COLUMN_BLOCK};
    int64_t fair = div_up(tiles, 4 * w->nth);                              // a few chunks each, so that the last ones even out
    c.group = most(least(fair, CHUNK_BYTES / bytes), div_up(CHUNK_MIN_BYTES, bytes));
    c.groups = div_up(tiles, c.group);
    c.blocks = div_up(div_up(cols, SMALL_COLS), c.block);
    return c;
}

// ---- what happens to a finished tile -------------------------------------------------------------------------------------------------
typedef struct {
    int glu;                                     // -1, or GLU_*: act(first matrix) * second matrix
    float scale;                                 // of the product
    const float *bias[2];
} epilogue;

// One column of a tile: 16 sums of each matrix to `rows` floats of dst.
INLINE void finish(const epilogue *e, const float *a, const float *b, int64_t row, int rows, const float *residual, float *dst) {
    float bias[TILE_ROWS] = {0}, old[TILE_ROWS] = {0}, y[TILE_ROWS];
    const int whole = rows == TILE_ROWS;
    for (int v = 0; v < TILE_ROWS; v += VL) {
        vf x = vf_load(a + v);
        if (e->scale != 1.0f) x *= e->scale;
        if (e->bias[0]) {
            if (!whole) memcpy(bias, e->bias[0] + row, rows * sizeof(float));
            x += vf_load((whole ? e->bias[0] + row : bias) + v);
        }
        if (e->glu >= 0) {
            vf up = vf_load(b + v);
            if (e->bias[1]) {
                if (!whole) memcpy(bias, e->bias[1] + row, rows * sizeof(float));
                up += vf_load((whole ? e->bias[1] + row : bias) + v);
            }
            x = vf_glu(e->glu, x, up);
        }
        if (residual) {
            if (!whole) memcpy(old, residual, rows * sizeof(float));
            x += vf_load((whole ? residual : old) + v);
        }
        vf_store((whole ? dst : y) + v, x);
    }
    if (!whole) memcpy(dst, y, rows * sizeof(float));
}

// Columns of the result: where column c is stored, and what is added to it.
typedef struct { const pyg_view *dst, *residual; } target;

static void store_tile(const epilogue *e, const target *to, const float *a, const float *b, int64_t row, int rows, int64_t column, int N) {
    for (int n = 0; n < N; n++) {
        const float *residual = to->residual ? (const float *)column_at(to->residual, column + n) + row : NULL;
        finish(e, a + n * TILE_ROWS, b + n * TILE_ROWS, row, rows, residual, (float *)column_at(to->dst, column + n) + row);
    }
}

// ---- a few columns against raw rows: ggml's dot product ---------------------------------------------------------------------------------
static void row_tile(const matrix *m, int64_t tile, int layout, const char *acts, int N, float *out) {
    const char *row = m->raw + tile * TILE_ROWS * m->row_stride;
    int64_t column = act_column_bytes(layout, m->k);
    for (int r = 0; r < tile_rows(m, tile); r++)
        for (int n = 0; n < N; n++) out[n * TILE_ROWS + r] = kernels->dot[m->type](m->k, row + r * m->row_stride, acts + n * column);
}

// ---- the steps --------------------------------------------------------------------------------------------------------------------------
// One group of row tiles x one block of column tiles, for one matrix or a gate/up pair.
static void run_chunk(worker *w, const matrix *m, int n_matrices, const epilogue *e, const target *to,
                      int64_t group, int64_t first_tile, int64_t last_tile, int layout, const char *acts, int64_t cols, int64_t first, int64_t last) {
    (void)group;
    _Alignas(64) float out[2][SMALL_COLS * TILE_ROWS];
    int rows_layout = ACT_LAYOUT[layout].row_type != 0;
    int64_t column_bytes = act_column_bytes(layout, m->k);
    for (int i = 0; i < n_matrices; i++)
        if (m[i].packed) pack_tiles(&m[i], first_tile, last_tile);
    for (int64_t t = first_tile; t < last_tile; t++) {
        const char *tile[2] = {NULL, NULL};
        char *scratch = w->scratch;
        for (int i = 0; i < n_matrices && !rows_layout; i++) {
            tile[i] = tile_at(&m[i], t, scratch);
            if (!m[i].packed) scratch += m[i].bytes;
        }
        for (int64_t c = first; c < last; c++) {
            int N = act_tile_cols(cols, c);
            const char *a = acts + c * SMALL_COLS * column_bytes;
            for (int i = 0; i < n_matrices; i++) {
                if (rows_layout) row_tile(&m[i], t, layout, a, N, out[i]);
                else TILE_KERNELS[m[i].tile][N - 1](tile[i], a, m[i].k, out[i]);
            }
            store_tile(e, to, out[0], out[1], t * TILE_ROWS, tile_rows(m, t), c * SMALL_COLS, N);
        }
    }
}

// mul_mat and glu_mat: second_weight is the source of Wup, or -1.
static void matmul(worker *w, const pyg_step *s, const pyg_view *second, epilogue e, const pyg_view *residual) {
    const pyg_view *dst = view_of(w, s->dst), *weight = view_of(w, s->src[0]);
    int64_t cols = dst->ne[1] * dst->ne[2];
    int layout = act_layout(s->i[1], cols);
    matrix m[2] = {matrix_of(weight, 0, layout)};
    if (second) m[1] = matrix_of(second, 0, layout);
    target to = {dst, residual};
    chunking c = chunks_of(w, m[0].tiles, m[0].bytes * (second ? 2 : 1), cols);
    int64_t tiles = div_up(cols, SMALL_COLS);
    const char *acts = NULL;
    for (int64_t i; (i = claim(w)) < c.groups * c.blocks;) {
        int64_t g = i / c.blocks, b = i % c.blocks;
        if (!acts) acts = s->i[2] ? view_of(w, s->src[1])->data : act_private(w, s, layout, cols);
        run_chunk(w, m, second ? 2 : 1, &e, &to, g, g * c.group, least((g + 1) * c.group, m[0].tiles), layout, acts, cols,
                  b * c.block, least((b + 1) * c.block, tiles));
    }
}

static const float *floats_of(const worker *w, int32_t view) { return view < 0 ? NULL : (const float *)w->plan->views[view].data; }

static void op_mul_mat(worker *w, const pyg_step *s) {
    epilogue e = {.glu = -1, .scale = s->f[1] != 0 ? s->f[1] : 1.0f, .bias = {floats_of(w, s->src[3])}};
    matmul(w, s, NULL, e, view_of(w, s->src[4]));
}

static void op_glu_mat(worker *w, const pyg_step *s) {
    epilogue e = {.glu = s->i[3], .scale = 1.0f, .bias = {floats_of(w, s->src[4]), floats_of(w, s->src[5])}};
    matmul(w, s, view_of(w, s->src[3]), e, NULL);
}

static int64_t scratch_mul_mat(const pyg_plan *plan, const pyg_step *s) {
    int64_t bytes = tile_scratch(&plan->views[s->src[0]], s->i[1]);
    return s->op == OP_glu_mat ? bytes + tile_scratch(&plan->views[s->src[3]], s->i[1]) : bytes;
}
static void op_mul_mat_id(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_glu_mat_id(worker *w, const pyg_step *s) { (void)w; (void)s; }
static int64_t scratch_mul_mat_id(const pyg_plan *plan, const pyg_step *s) { (void)plan; (void)s; return 0; }
