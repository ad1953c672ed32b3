// The matmul driver: which tiles of which weight meet which columns, in what order, by whom.
//
// A chunk is a group of row tiles x a block of column tiles. Column blocks run fastest, so a weight comes from memory once per
// batch and from the cache afterwards. With a packed weight the tile is where it lies (packed on first touch); otherwise a
// worker makes it in its scratch memory, once per chunk.
#pragma once
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

static int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

enum { COLUMN_BLOCK = 8 };                       // column tiles in a chunk: 64 columns of activations stay in the L2 cache
enum { SPREAD_BLOCK = 16 };                      // ... of spread tiles: spreading takes the time of one or two columns
enum { CHUNK_BYTES = 128 << 10, CHUNK_MIN_BYTES = 16 << 10 };      // of weights: worth a claim; small enough to balance
enum { STREAM_BYTES = 512 << 10 };               // for a few columns, where weights come from memory: a stream is slow to start
enum { RUN_TILES = 8 };                          // tiles of one matrix before the other's: likewise
enum { PREFETCH_BYTES = 1024 };                  // of the next stream, while this one ends
enum { WIDE_PAIRS = 8, WIDE_BLOCK = 512, WIDE_SQUARES = 64 };      // a matrix unit's chunk: row tiles / 2, columns; squares of a tile at a time

typedef struct {                                 // one matrix of (rows, k): a weight, or one expert's part of it
    const char *raw;                             // its first row in the file
    char *packed;                                // its tiles, or NULL
    _Atomic uint8_t *ready;                      // TILE_* per tile
    int64_t rows, k, row_stride, tiles, bytes;   // bytes: of a tile
    int type, tile, release;                     // ggml type; type of the tiles
    tile_fn *const *kernels;                     // by columns less one
} matrix;

static matrix matrix_of(const pyg_view *v, int64_t expert, int layout) {
    int64_t tiles = tile_count(v->ne[1]);
    int type = v->type, tile = layout == ACT_F32 && TILE_TYPES[type].block != 1 ? TYPE_f32 : tile_of(type);
    int64_t bytes = tile_bytes(tile, v->ne[0]);
    return (matrix){
        .raw = row_at(v, 0, expert, 0), .packed = v->packed ? v->packed + expert * tiles * bytes : NULL,
        .ready = (_Atomic uint8_t *)(v->ready + (v->packed ? expert * tiles : 0)),
        .rows = v->ne[1], .k = v->ne[0], .row_stride = v->nb[1], .tiles = tiles, .bytes = bytes, .type = type, .tile = tile, .release = v->release, .kernels = TILE_KERNELS[tile],
    };
}

// ---- tiles: packed on first touch, or made in scratch ----------------------------------------------------------------------------
enum { TILE_RAW, TILE_BUSY, TILE_READY };

static int tile_rows(const matrix *m, int64_t tile) {
    int64_t left = m->rows - tile * TILE_ROWS;
    return left < TILE_ROWS ? (int)left : TILE_ROWS;
}

// Gives back the file's whole pages behind tiles [first, last). Mapping a page in maps its surroundings too, and pages straddle
// tiles; so once the last tile is packed, everything goes back.
static void release_pages(const matrix *m, int64_t first, int64_t last) {
    int64_t t = 0;
    while (t < m->tiles && atomic_load_explicit(&m->ready[t], memory_order_relaxed) == TILE_READY) t++;
    if (t == m->tiles) first = 0, last = m->tiles;
    const uintptr_t page = sysconf(_SC_PAGESIZE), base = (uintptr_t)m->raw;
    const uintptr_t start = (base + first * TILE_ROWS * m->row_stride + page - 1) / page * page;
    const uintptr_t end = (base + least(last * TILE_ROWS, m->rows) * m->row_stride) / page * page;
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

// Dequantized rows as a tile of floats: [k][16].
static void float_tile(const matrix *m, int64_t tile, float *out, float *row) {
    int rows = tile_rows(m, tile);
    for (int r = 0; r < TILE_ROWS; r++) {
        if (r < rows) dequantize_row(m->type, m->k, m->raw + (tile * TILE_ROWS + r) * m->row_stride, row);
        else memset(row, 0, m->k * sizeof(float));
        for (int64_t i = 0; i < m->k; i++) out[i * TILE_ROWS + r] = row[i];
    }
}

// A tile of a weight that is not packed, in scratch; float tiles need one row beside it.
static int64_t tile_scratch(const matrix *m) { return m->bytes + m->k * (int64_t)sizeof(float); }
static const char *make_tile(const matrix *m, int64_t tile, char *scratch) {
    if (m->tile == TYPE_f32 && m->type != TYPE_f32) float_tile(m, tile, (float *)scratch, (float *)(scratch + m->bytes));
    else PACKERS[m->type](m->raw + tile * TILE_ROWS * m->row_stride, m->row_stride, tile_rows(m, tile), m->k, scratch);
    return scratch;
}

// ---- chunks ------------------------------------------------------------------------------------------------------------------------
typedef struct { int64_t group, groups, block, blocks; } chunking;        // row tiles per group, column tiles per block, and how many

// How many row tiles are computed at once, each a stream from memory.
static int takes_streams(int64_t cols) { return fetch_streams && cols <= STREAM_COLS ? STREAMS_OF(cols) : 1; }

// tile_bytes: of a tile of each matrix
static chunking chunks_of(const worker *w, int64_t tiles, int matrices, int64_t tile_bytes, int layout, int64_t cols, int spread) {
    chunking c = {.block = spread ? SPREAD_BLOCK : COLUMN_BLOCK};
    const int64_t fair = div_up(tiles, 4 * w->nth), bytes = tile_bytes * matrices;     // a few chunks each, so that the last ones even out
    if (ACT_LAYOUT[layout].parts) {
        const int per_pair = 2 / matrices;
        c.block = WIDE_BLOCK / MATRIX_SIDE;
        c.group = least(div_up(fair, per_pair), WIDE_PAIRS) * per_pair;
    } else {
        const int streams = takes_streams(cols);
        const int64_t limit = streams > 1 ? streams * STREAM_BYTES : cols <= SMALL_COLS && !fetch_streams ? STREAM_BYTES : CHUNK_BYTES;
        c.group = most(least(fair, limit / bytes), div_up(CHUNK_MIN_BYTES, bytes));
        // large chunks: as many for each worker, so that none waits for another's last one
        const int64_t each = most(div_up(div_up(tiles, c.group), w->nth), 1);
        if (streams > 1) c.group = most(div_up(tiles, each * w->nth), streams);
    }
    c.groups = div_up(tiles, c.group);
    c.blocks = div_up(act_tiles(layout, cols), c.block);
    return c;
}

// ---- what happens to a finished tile -------------------------------------------------------------------------------------------------
typedef struct {
    int glu;                                     // -1, or GLU_*: act(first matrix) * second matrix
    float scale;                                 // of the product
    float softcap;                               // of the result; 0: none
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
        if (e->softcap != 0.0f) x = vf_softcap(x, e->softcap);
        vf_store((whole ? dst : y) + v, x);
    }
    if (!whole) memcpy(dst, y, rows * sizeof(float));
}

// Columns of the result: where column c is stored, and what is added to it. map: which column of dst is meant, or NULL.
typedef struct { const pyg_view *dst, *residual; const int32_t *map; } target;
enum { LANDING = MATRIX_UNIT ? 2 * MATRIX_SIDE : SMALL_COLS };
typedef struct { float *to[LANDING]; const float *residual[LANDING]; } landing;     // first rows of some columns

static landing landing_of(const target *to, int64_t column, int N) {
    landing l;
    for (int n = 0; n < N; n++) {
        l.to[n] = (float *)column_at(to->dst, to->map ? to->map[column + n] : column + n);
        l.residual[n] = to->residual ? (const float *)column_at(to->residual, column + n) : NULL;
    }
    return l;
}

static void store_tile(const epilogue *e, const landing *l, const float *a, const float *b, int64_t row, int rows, int first, int N) {
    for (int n = first; n < first + N; n++, a += TILE_ROWS, b += TILE_ROWS)
        finish(e, a, b, row, rows, l->residual[n] ? l->residual[n] + row : NULL, l->to[n] + row);
}

// ---- a few columns against raw rows: ggml's dot product ---------------------------------------------------------------------------------
static void row_tile(const matrix *m, int64_t tile, int layout, const char *acts, int N, float *out) {
    const char *row = m->raw + tile * TILE_ROWS * m->row_stride;
    int64_t column = act_column_bytes(layout, m->k);
    const int rows = tile_rows(m, tile);
    int r = 0;
    for (; r + DOT_ROWS <= rows; r += DOT_ROWS)
        for (int n = 0; n < N; n++) DOTS_OF_ROWS[m->type](m->k, row + r * m->row_stride, m->row_stride, acts + n * column, out + n * TILE_ROWS + r);
    for (; r < rows; r++)
        for (int n = 0; n < N; n++) out[n * TILE_ROWS + r] = kernels->dot[m->type](m->k, row + r * m->row_stride, acts + n * column);
}

// ---- the steps --------------------------------------------------------------------------------------------------------------------------
// A step's work, the same for all its chunks: one matrix, or a gate/up pair.
typedef struct {
    matrix m[2];
    int matrices, layout, spread;                // spread: columns meet spread tiles
    int64_t then;                                // the first row tile of the worker's next chunk
    epilogue finish;
    target to;
} job;

// The first lines of tiles that come next: the processor's own prefetch only sees them when they are there.
static inline void prefetch_run(const job *j, int matrix_index, int64_t tile) {
    const matrix *m = &j->m[matrix_index];
    if (fetch_streams || !m->packed || tile >= m->tiles) return;
    for (int at = 0; at < PREFETCH_BYTES; at += LINE) __builtin_prefetch(m->packed + tile * m->bytes + at);
}

// The tile that comes from memory after tile t of matrix i, in a run of tiles start .. end of a chunk that ends with tile last.
static inline const char *tile_after(const job *j, int i, int64_t t, int64_t start, int64_t end, int64_t last) {
    if (++t == end) {
        if (++i < j->matrices) t = start;
        else if (i = 0, t == last) t = j->then;
    }
    return j->m[i].packed && t < j->m[i].tiles ? j->m[i].packed + t * j->m[i].bytes : NULL;
}

// One column tile, packed weights: of row tiles from first_tile on `streams` runs of neighbours, a tile of each run at once. How many were done.
static int64_t run_streams(const job *j, int streams, int64_t first_tile, int64_t last_tile, const char *acts, int cols) {
    _Alignas(64) float out[2][RUN_TILES][SMALL_COLS * TILE_ROWS];
    const int64_t run = (last_tile - first_tile) / streams;
    const landing at = landing_of(&j->to, 0, cols);
    for (int64_t start = first_tile; start < first_tile + run; start += RUN_TILES) {
        const int64_t end = least(start + RUN_TILES, first_tile + run);
        for (int i = 0; i < j->matrices; i++) {
            const matrix *m = &j->m[i];
            for (int64_t t = start; t < end; t++)
                STREAM_KERNELS[m->tile][cols - 1](m->packed + t * m->bytes, run * m->bytes, acts, m->k, out[i][t - start]);
        }
        for (int64_t t = start; t < end; t++)
            for (int s = 0; s < streams; s++)
                for (int n = 0; n < cols; n++) {
                    const int64_t tile = t + s * run, sums = (n * streams + s) * TILE_ROWS;
                    store_tile(&j->finish, &at, out[0][t - start] + sums, out[1][t - start] + sums, tile * TILE_ROWS, tile_rows(&j->m[0], tile), n, 1);
                }
    }
    return streams * run;
}

// Row tiles [first_tile, last_tile) x column tiles [first, last) of `cols` columns. A column tile stays in the first-level cache
// while the weights pass, and the results of neighbouring row tiles fall on neighbouring cache lines.
static void run_chunk(worker *w, const job *j, int64_t first_tile, int64_t last_tile, const char *acts, int64_t cols, int64_t first, int64_t last) {
    _Alignas(64) float out[2][RUN_TILES][SMALL_COLS * TILE_ROWS];
    const int64_t column_bytes = act_column_bytes(j->layout, j->m[0].k);
    const int by_rows = ACT_LAYOUT[j->layout].row_type != 0, width = act_width(j->layout, cols);
    const int from_memory = fetch_streams && cols <= SMALL_COLS;
    const char *made[2] = {NULL, NULL};                      // the one tile of a chunk whose weight is not packed
    for (int i = 0; i < j->matrices; i++) {
        const matrix *m = &j->m[i];
        if (m->packed) pack_tiles(m, first_tile, last_tile);
        else if (!by_rows) made[i] = make_tile(m, first_tile, w->scratch + i * tile_scratch(&j->m[0]));
    }
    const int streams = takes_streams(cols);
    if (streams > 1 && j->m[0].packed && j->m[j->matrices - 1].packed) first_tile += run_streams(j, streams, first_tile, last_tile, acts, (int)cols);
    for (int64_t c = first; c < last; c++) {
        const int N = act_tile_cols(j->layout, cols, c);
        const char *a = acts + c * width * column_bytes;
        const landing at = landing_of(&j->to, c * width, N);
        for (int64_t start = first_tile; start < last_tile; start += RUN_TILES) {
            const int64_t end = least(start + RUN_TILES, last_tile);
            for (int i = 0; i < j->matrices; i++) {
                const matrix *m = &j->m[i];
                for (int64_t t = start; t < end; t++) {
                    float *sums = out[i][t - start];
                    if (i == 0) for (int n = 0; n < N; n++) __builtin_prefetch(at.to[n] + t * TILE_ROWS, 1);
                    if (t == end - 1) prefetch_run(j, i + 1 < j->matrices ? i + 1 : 0, i + 1 < j->matrices ? start : end);
                    if (by_rows) row_tile(m, t, j->layout, a, N, sums);
                    else m->kernels[N - 1](m->packed ? m->packed + t * m->bytes : made[i], a, m->k, sums,
                                           from_memory ? tile_after(j, i, t, start, end, last_tile) : NULL);
                }
            }
            for (int64_t t = start; t < end; t++)
                store_tile(&j->finish, &at, out[0][t - start], out[1][t - start], t * TILE_ROWS, tile_rows(&j->m[0], t), 0, N);
        }
    }
}

// ---- many columns through spread tiles ---------------------------------------------------------------------------------------------
// Along k it goes SPREAD_DEPTH weights at a time: that much of a row tile stays in the first-level cache while the columns pass.
typedef struct { float *sums[2]; char *spread, *made; int64_t bytes; } spread_memory;

static spread_memory spread_layout(char *base, const matrix *m) {
    spread_memory at = {.sums = {(float *)base}};
    at.sums[1] = at.sums[0] + SPREAD_BLOCK * SMALL_COLS * TILE_ROWS;
    at.spread = (char *)(at.sums[1] + SPREAD_BLOCK * SMALL_COLS * TILE_ROWS);
    at.made = at.spread + spread_bytes(m->tile, SPREAD_DEPTH);
    at.bytes = at.made - base + (m->packed ? 0 : tile_scratch(m));
    return at;
}

// Row tile t of a matrix x column tiles [first, last) -> sums[column][16]
static void spread_one(const matrix *m, int64_t t, int layout, const char *acts, int64_t cols, int64_t first, int64_t last, const spread_memory *at, float *sums) {
    const tile_type d = TILE_TYPES[m->tile];
    const act_layout_row *act = &ACT_LAYOUT[layout];
    const int64_t column_bytes = act_column_bytes(layout, m->k);
    const char *tile = m->packed ? m->packed + t * m->bytes : make_tile(m, t, at->made);
    const int64_t whole = act->across ? last : most(first, least(last, cols / SMALL_COLS));      // column tiles of eight columns
    memset(sums, 0, (last - first) * SMALL_COLS * TILE_ROWS * sizeof *sums);
    for (int64_t start = 0; start < m->k; start += SPREAD_DEPTH) {
        const int64_t depth = least(SPREAD_DEPTH, m->k - start), skip = start / act->block * act->column_bytes * SMALL_COLS;
        SPREAD_KERNELS[m->tile].spread(tile + start / d.block * tile_block_bytes(d), depth, at->spread);
        for (int64_t c = first; c < whole; c++) {
            const char *a = acts + c * SMALL_COLS * column_bytes + skip;
            SPREAD_KERNELS[m->tile].columns(at->spread, a, depth, act_tile_cols(layout, cols, c), sums + (c - first) * SMALL_COLS * TILE_ROWS);
        }
    }
    if (whole < last) m->kernels[cols % SMALL_COLS - 1](tile, acts + whole * SMALL_COLS * column_bytes, m->k, sums + (whole - first) * SMALL_COLS * TILE_ROWS, NULL);
}

static void run_spread(worker *w, const job *j, int64_t first_tile, int64_t last_tile, const char *acts, int64_t cols, int64_t first, int64_t last) {
    for (int i = 0; i < j->matrices; i++)
        if (j->m[i].packed) pack_tiles(&j->m[i], first_tile, last_tile);
    for (int64_t t = first_tile; t < last_tile; t++) {
        spread_memory at;
        for (int64_t c = first; c < last; c++) {                     // the results' lines are there when the sums are
            const int N = act_tile_cols(j->layout, cols, c);
            const landing to = landing_of(&j->to, c * SMALL_COLS, N);
            for (int n = 0; n < N; n++) __builtin_prefetch(to.to[n] + t * TILE_ROWS, 1);
        }
        for (int i = 0; i < j->matrices; i++) {
            at = spread_layout(w->scratch, &j->m[i]);
            spread_one(&j->m[i], t, j->layout, acts, cols, first, last, &at, at.sums[i]);
        }
        for (int64_t c = first; c < last; c++) {
            const int N = act_tile_cols(j->layout, cols, c);
            const int64_t sums = (c - first) * SMALL_COLS * TILE_ROWS;
            const landing to = landing_of(&j->to, c * SMALL_COLS, N);
            store_tile(&j->finish, &to, at.sums[0] + sums, at.sums[1] + sums, t * TILE_ROWS, tile_rows(&j->m[0], t), 0, N);
        }
    }
}

// ---- many columns through a matrix unit ------------------------------------------------------------------------------------------
// A chunk is pairs of row tiles (or of gate and up) x pairs of column tiles. Along k it goes WIDE_SQUARES squares at a time: the weights of
// all pairs are unpacked for that depth (1 MB) and stay in the second-level cache with the columns of a pair. Sums that are not whole wait
// in scratch.
typedef struct { char *weights, *made; float *sums; int64_t bytes; } wide_memory;

static wide_memory wide_layout(char *base, const matrix *m) {
    wide_memory at = {.weights = base};
    at.sums = (float *)(at.weights + 2 * WIDE_PAIRS * WIDE_SQUARES * MATRIX_SQUARE);
    at.made = (char *)(at.sums + WIDE_PAIRS * 2 * TILE_ROWS * WIDE_BLOCK);
    at.bytes = at.made - base + (m->packed ? 0 : tile_bytes(m->tile, WIDE_SQUARES * MATRIX_DEPTH));
    return at;
}

// `steps` squares of row tile t, from square `start` on.
static void make_squares(const matrix *m, int64_t t, int64_t start, int64_t steps, int parts, char *made, char *to) {
    const char *tile = m->packed + t * m->bytes;
    int64_t k = m->k;
    if (!m->packed) {
        const int64_t at = start * MATRIX_DEPTH;
        k = least(steps * MATRIX_DEPTH, k - at);
        PACKERS[m->type](m->raw + t * TILE_ROWS * m->row_stride + row_bytes(m->type, at), m->row_stride, tile_rows(m, t), k, made);
        tile = made;
        start = 0;
    }
    for (int64_t i = 0; i < steps; i++, to += parts * MATRIX_SQUARE) SQUARES[m->tile](tile, k, start + i, to);
}

// Whether sums of whole tiles are the result as they are, but for a residual, from which they then start: the unit reads and writes the
// columns by itself.
static int ends_in_columns(const job *j) {
    const pyg_view *residual = j->to.residual;
    const int as_they_are = j->matrices == 1 && j->finish.scale == 1.0f && j->finish.softcap == 0.0f && !j->finish.bias[0];
    return as_they_are && !j->to.map && j->to.dst->ne[2] == 1 && (!residual || residual->ne[2] == 1);
}

static void run_wide(worker *w, const job *j, int64_t first_tile, int64_t last_tile, const char *acts, int64_t cols, int64_t first, int64_t last) {
    const wide_memory at = wide_layout(w->scratch, &j->m[0]);
    const int parts = ACT_LAYOUT[j->layout].parts, per_pair = 2 / j->matrices;
    const int64_t square = parts * MATRIX_SQUARE, k = j->m[0].k, steps = div_up(k, MATRIX_DEPTH), columns = act_column_bytes(j->layout, k) * MATRIX_SIDE;
    const int64_t pairs = div_up(last_tile - first_tile, per_pair), at_once = WIDE_SQUARES / parts;
    const int in_columns = ends_in_columns(j);
    for (int i = 0; i < j->matrices; i++)
        if (j->m[i].packed) pack_tiles(&j->m[i], first_tile, last_tile);
    matrix_shape others;
    matrix_begin(&others);
    for (int64_t start = 0; start < steps; start += at_once) {
        const int64_t depth = least(at_once, steps - start), whole = start + depth == steps;
        for (int64_t p = 0; p < 2 * pairs; p++) {
            const int64_t t = first_tile + p / j->matrices;
            if (t < last_tile) make_squares(&j->m[p % j->matrices], t, start, depth, parts, at.made, at.weights + p * WIDE_SQUARES * MATRIX_SQUARE);
        }
        for (int64_t c = first; c < last; c += 2) {
            const char *a[2] = {acts + c * columns + start * square, acts + least(c + 1, last - 1) * columns + start * square};
            const int N = (int)least(2 * MATRIX_SIDE, cols - c * MATRIX_SIDE);
            const landing to = landing_of(&j->to, c * MATRIX_SIDE, N);
            for (int64_t p = 0; p < pairs; p++) {
                const char *b[2] = {at.weights + 2 * p * WIDE_SQUARES * MATRIX_SQUARE, at.weights + (2 * p + 1) * WIDE_SQUARES * MATRIX_SQUARE};
                float *sums = at.sums + (depth == steps ? 0 : ((c - first) / 2 * WIDE_PAIRS + p) * 4 * TILE_ROWS * MATRIX_SIDE);
                const int64_t row = (first_tile + p * per_pair) * TILE_ROWS;
                const int directly = in_columns && N == 2 * MATRIX_SIDE && row + 2 * TILE_ROWS <= j->m[0].rows;
                matrix_sums before = squares_at(sums), after = before;
                if (directly && start == 0 && to.residual[0]) before = columns_at((float *)to.residual[0] + row, j->to.residual->nb[1]);
                if (directly && whole) after = columns_at(to.to[0] + row, j->to.dst->nb[1]);
                const matrix_sums *from = start == 0 && !(directly && to.residual[0]) ? NULL : &before;
                if (parts == 1) matrix_block(1, a, b, depth, from, &after);
                else matrix_block(2, a, b, depth, from, &after);
                if (!whole || directly) continue;
                for (int i = 0; i < per_pair; i++) {
                    const int64_t t = first_tile + p * per_pair + i;
                    if (t == last_tile) break;
                    for (int n = 0; n < N; n += MATRIX_SIDE) {
                        const float *x = sums + (2 * n + i * MATRIX_SIDE) * TILE_ROWS;
                        store_tile(&j->finish, &to, x, x + MATRIX_SIDE * TILE_ROWS, t * TILE_ROWS, tile_rows(&j->m[0], t), n, (int)least(MATRIX_SIDE, N - n));
                    }
                }
            }
        }
    }
    matrix_end(&others);
}

// The row tiles of a chunk, in the way that its columns take.
static void run_tiles(worker *w, const job *j, int64_t first_tile, int64_t last_tile, const char *acts, int64_t cols, int64_t first, int64_t last) {
    const int wide = ACT_LAYOUT[j->layout].parts != 0;
    if (wide || j->spread) (wide ? run_wide : run_spread)(w, j, first_tile, last_tile, acts, cols, first, last);
    else if (j->m[0].packed) run_chunk(w, j, first_tile, last_tile, acts, cols, first, last);
    else for (int64_t t = first_tile; t < last_tile; t++) run_chunk(w, j, t, t + 1, acts, cols, first, last);     // made in scratch, one for all columns
}

// mul_mat, or glu_mat with its second weight.
static void matmul(worker *w, const pyg_step *s, const pyg_view *second, epilogue finish, const pyg_view *residual) {
    const pyg_view *dst = view_of(w, s->dst), *weight = view_of(w, s->src[0]);
    const int64_t cols = dst->ne[1] * dst->ne[2];
    const int layout = act_layout(s->i[1], cols);
    const int64_t col_tiles = act_tiles(layout, cols);
    job j = {.matrices = second ? 2 : 1, .layout = layout, .spread = takes_spread(s->i[1], cols), .then = INT64_MAX, .finish = finish, .to = {dst, residual, NULL}};
    j.m[0] = matrix_of(weight, 0, layout);
    if (second) j.m[1] = matrix_of(second, 0, layout);
    const int64_t tiles = j.m[0].tiles;
    const chunking c = chunks_of(w, tiles, j.matrices, j.m[0].bytes, layout, cols, j.spread);
    const char *acts = NULL;
    const int early = cols <= SMALL_COLS && claims_early(w, c.groups);
    const int64_t chunks = c.groups * c.blocks;
    for (int64_t i = claim(w, chunks), next = 0; i < chunks; i = early ? next : claim(w, chunks)) {
        if (early) j.then = least(next = claim(w, chunks), c.groups) * c.group;
        int64_t g = i / c.blocks, b = i % c.blocks;
        if (!acts) acts = s->i[2] ? view_of(w, s->src[1])->data : act_private(w, s, layout, cols);
        run_tiles(w, &j, g * c.group, least((g + 1) * c.group, tiles), acts, cols, b * c.block, least((b + 1) * c.block, col_tiles));
    }
}

static const float *floats_of(const worker *w, int32_t view) { return view < 0 ? NULL : (const float *)w->plan->views[view].data; }

static void op_mul_mat(worker *w, const pyg_step *s) {
    epilogue e = {.glu = -1, .scale = s->f[1] != 0 ? s->f[1] : 1.0f, .softcap = s->f[2], .bias = {floats_of(w, s->src[3])}};
    matmul(w, s, NULL, e, view_of(w, s->src[4]));
}

static void op_glu_mat(worker *w, const pyg_step *s) {
    epilogue e = {.glu = s->i[3], .scale = 1.0f, .bias = {floats_of(w, s->src[4]), floats_of(w, s->src[5])}};
    matmul(w, s, view_of(w, s->src[3]), e, NULL);
}

// Private memory for the tiles of a step whose weights are not packed; the columns may be few or many.
static int64_t scratch_tiles(const pyg_view *first, const pyg_view *second, int format) {
    const int few = ACT_LAYOUT[format % ACT_WIDE].interleaved;
    matrix a = matrix_of(first, 0, few), b = matrix_of(second, 0, few);
    const int64_t tiles = (a.packed ? 0 : tile_scratch(&a)) + (b.packed ? 0 : tile_scratch(&b));
    if (format < ACT_WIDE) return tiles;
    return most(tiles, SPREADS ? most(spread_layout(NULL, &a).bytes, spread_layout(NULL, &b).bytes)
                               : most(wide_layout(NULL, &a).bytes, wide_layout(NULL, &b).bytes));
}

static int64_t scratch_mul_mat(const pyg_plan *plan, const pyg_step *s) {
    const int up = s->op == OP_glu_mat ? 3 : 0;
    return scratch_tiles(&plan->views[s->src[0]], &plan->views[s->src[up]], s->i[1]);
}
