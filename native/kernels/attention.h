// Attention over the cache: `attention` for batches, `attention_step` for decoding, which also ropes and stores.
//
// Both walk runs: tokens that follow each other in one sequence (equal first cell, cells rising by one). Every cell between
// its sequence's first and a token's own has been written, so a tile never holds one that was not. Work is shared out as
// (KV head, run) or, when decoding, (KV head, split of the cells).
//
// A token's bits do not depend on how many tokens attention_step gets at once: a score's sum is cut as for one token alone, and tiles
// and splits begin at multiples of their lengths from the sequence's first cell, so that what other tokens see beyond adds zeros.
#include "attend.h"
#include "attend_squares.h"

enum {
    UNIT_ROWS = 256,                    // rows that share the conversion of a tile
    SPLIT_CELLS = 256,                  // decoding: cells of one split, more when the cache would then have over MAX_SPLITS
    MAX_SPLITS = 64,
};

typedef struct {                        // a step's operands, read once
    const pyg_view *dst, *q, *k, *v;    // k and v: the cache
    const int32_t  *cell, *first;
    const float    *sinks;              // of each query head, or NULL
    int64_t         tokens, share, kv_heads, D, window, words, padded;      // share: query heads per KV head
    float           scale, softcap;
    int             pair, parts, tile;  // parts: how a score's sum is cut (shape_group); tile: cells converted together, up to TILE_CELLS
    int             squares;            // attention goes through a matrix unit
} attention_args;

typedef struct {                        // private memory of one unit of work
    query_group *groups;
    float       *q, *state;             // queries; out, max and sum of every group
    int32_t     *visible;               // lo and hi of every group
    float       *row, *row2;            // one row each
    kv_tile      tile;
    int32_t     *run_start;             // attention: where the runs begin
} attention_memory;

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int32_t first_visible(const attention_args *a, int64_t t) {
    int64_t edge = a->window > 0 ? a->cell[t] - a->window + 1 : a->first[t];
    return (int32_t)(edge > a->first[t] ? edge : a->first[t]);
}
// Where tiles (or splits) of `length` cells begin for what token t sees: at a multiple of it from its sequence's first cell.
INLINE int64_t first_of_its(const attention_args *a, int64_t t, int64_t length) {
    return a->first[t] + (first_visible(a, t) - a->first[t]) / length * length;
}
INLINE int64_t run_end(const attention_args *a, int64_t t, int64_t limit) {
    int64_t end = t + 1;
    while (end < a->tokens && end - t < limit && a->first[end] == a->first[t] && a->cell[end] == a->cell[end - 1] + 1) end++;
    return end;
}

#define FAST_PAIRS (NATIVE_BF16 && !slow_bf16)
static int in_squares(int64_t tokens, int fixed) { return MATRIX_UNIT && !fixed && tokens > WIDE_COLS; }
static int attends_in_bf16(int64_t tokens, int fixed) { return FAST_PAIRS || in_squares(tokens, fixed); }

// bf16 dot products serve a bf16 cache as it is; of any other they would be felt (ten times what an F16 cache loses), so a plan
// asks for them with `coarse`, which a processor that is slow at them takes for leave only. An F32 cache is always read in full. A matrix
// unit does not add as attention_step does: it has the batches that it has in matmuls, but where bits are `fixed`.
static attention_args attention_shape(const pyg_view *views, const pyg_step *s, int32_t sinks, int coarse, int fixed) {
    const pyg_view *q = &views[s->src[0]], *k = &views[s->src[1]], *v = &views[s->src[2]];
    int all_bf16 = k->type == TYPE_bf16 && v->type == TYPE_bf16, any_f32 = k->type == TYPE_f32 || v->type == TYPE_f32;
    attention_args a = {
        .dst = &views[s->dst], .q = q, .k = k, .v = v,
        .cell = (const int32_t *)views[s->src[3]].data, .first = (const int32_t *)views[s->src[4]].data,
        .sinks = sinks < 0 ? NULL : (const float *)views[sinks].data,
        .tokens = q->ne[2], .share = q->ne[1] / k->ne[2], .kv_heads = k->ne[2], .D = q->ne[0], .window = s->i[0],
        .padded = round_up(q->ne[0], VL), .scale = s->f[0], .softcap = s->f[1],
    };
    const int rounds = !any_f32 && (coarse || all_bf16);
    a.pair = FAST_PAIRS && rounds;
    a.squares = in_squares(a.tokens, fixed) && rounds;
    a.tile = TILE_CELLS;
    a.parts = fixed ? lanes_per_row((int)a.share) : 0;
    a.words = a.pair ? round_up(a.padded / 2, VL) : a.padded;
    return a;
}

// ---- memory: a group's places are at most twice its rows (shape_group), and at least one vector --------------------------------
INLINE int64_t state_floats(const attention_args *a, int64_t rows, int64_t runs) { return 2 * rows * a->padded + 2 * (2 * rows + runs * VL); }
INLINE void *take(uintptr_t *at, int64_t bytes) { void *p = (void *)*at; *at += round_up(bytes, 64); return p; }

// Lays the memory of a unit of at most `rows` rows in `runs` runs out from `base`; returns the bytes it takes.
static int64_t attention_layout(attention_memory *m, const attention_args *a, char *base, int64_t rows, int64_t runs, int64_t starts) {
    uintptr_t at = (uintptr_t)base;
    int64_t lanes = 2 * rows + runs * VL;
    m->groups = take(&at, (rows / VL + runs) * sizeof(query_group));
    m->q = take(&at, (2 * rows * a->words + VL) * sizeof(float));
    m->state = take(&at, state_floats(a, rows, runs) * sizeof(float));
    m->visible = take(&at, 2 * lanes * sizeof(int32_t));
    m->row = take(&at, 2 * a->padded * sizeof(float));
    m->row2 = take(&at, 2 * a->padded * sizeof(float));
    m->tile = (kv_tile){.words = a->words, .padded = a->padded};
    m->tile.k = take(&at, TILE_CELLS * a->words * sizeof(float));
    m->tile.v = take(&at, TILE_CELLS * a->padded * sizeof(float));
    m->tile.scores = take(&at, TILE_CELLS * GROUP_VECS * VL * sizeof(float));
    m->run_start = take(&at, (starts + 1) * sizeof(int32_t));
    return (int64_t)(at - (uintptr_t)base);
}

// ---- one unit: queries in, tiles, results out ------------------------------------------------------------------------------------
// A pass over the groups of tokens t0 .. t1 whose running state lies at `state`; returns their number.
INLINE int64_t cut_groups(const attention_args *a, attention_memory *m, int64_t t0, int64_t t1, float *state) {
    int64_t rows = (t1 - t0) * a->share, n = 0;
    float *q = m->q;
    int32_t *visible = m->visible;
    for (int64_t row = 0; row < rows; row += m->groups[n++].rows) {
        query_group *g = &m->groups[n];
        shape_group(g, (int)row, (int)(rows - row), a->parts);
        int lanes = group_lanes(g);
        g->q = q, q += a->words / g->rep * lanes;
        g->out = state, state += a->padded / g->rep * lanes;
        g->max = state, state += lanes;
        g->sum = state, state += lanes;
        g->lo = visible, visible += lanes;
        g->hi = visible, visible += lanes;
    }
    return n;
}
INLINE float *state_end(const query_group *g) { return g->sum + group_lanes(g); }

// Queries of one group, scaled and transposed. table: rope them on the way (row by row), or NULL.
INLINE void load_group(const attention_args *a, attention_memory *m, query_group *g, int64_t t0, int64_t kv_head,
                       const pyg_view *table, int rope_kind, int64_t rope_dims) {
    int lanes = group_lanes(g);
    float scale = a->softcap > 0.0f ? a->scale / a->softcap : a->scale * LOG2_E;
    g->lo_min = g->hi_min = INT32_MAX, g->lo_max = g->hi_max = INT32_MIN;
    memset(g->q, 0, a->words / g->rep * lanes * sizeof(float));
    memset(g->out, 0, a->padded / g->rep * lanes * sizeof(float));
    for (int i = 0; i < lanes; i += VL) {
        vf_store(g->max + i, vf_set(NEVER_SEEN));
        vf_store(g->sum + i, vf_set(0.0f));
    }
    memset(g->lo, 0, lanes * sizeof(int32_t));          // lanes without a row see everything: their scores are 0
    memset(g->hi, 0x7f, lanes * sizeof(int32_t));
    for (int64_t d = a->D; d < 2 * a->padded; d++) m->row[d] = 0.0f;
    for (int r = 0; r < g->rows; r++) {
        int64_t t = t0 + (g->first_row + r) / a->share, head = kv_head * a->share + (g->first_row + r) % a->share;
        const float *query = (const float *)row_at(a->q, head, t, 0);
        if (table) rope_row(rope_kind, rope_dims, a->D, query, (const float *)row_at(table, 0, t, 0), m->row), query = m->row;
        for (int64_t d = 0; d < a->D; d++) m->row[d] = query[d] * scale;
        const float *words = m->row;
        if (a->pair) key_row(TYPE_f32, 1, a->words, (const char *)m->row, m->row2), words = m->row2;
        scatter_row(g, r, a->words, words, g->q);
        int32_t lo = first_visible(a, t), hi = a->cell[t];
        for (int i = 0; i < g->rep; i++) g->lo[r * g->rep + i] = lo, g->hi[r * g->rep + i] = hi;
        g->lo_min = lo < g->lo_min ? lo : g->lo_min, g->lo_max = lo > g->lo_max ? lo : g->lo_max;
        g->hi_min = hi < g->hi_min ? hi : g->hi_min, g->hi_max = hi > g->hi_max ? hi : g->hi_max;
    }
}

// Cells first .. first + cells of one KV head, converted once for every group of the unit. `type` is what the loops read: the
// cache itself where its rows are whole vectors of floats, or with `through` a row that was turned into floats first.
INLINE void load_keys(const attention_args *a, attention_memory *m, int type, int through, int64_t kv_head) {
    const char *cell = row_at(a->k, m->tile.first, kv_head, 0);
    float *to = m->tile.k;
    for (int c = 0; c < m->tile.cells; c++, cell += a->k->nb[1], to += a->words) {
        if (c % PANEL == 0) fetch_cells(&m->tile, m->tile.ahead_part);
        const char *row = through ? float_row(a->k->type, a->D, 2 * a->padded, cell, m->row) : cell;
        key_row(type, a->pair, a->words, row, to);
    }
}
INLINE void load_values(const attention_args *a, attention_memory *m, int type, int through, int64_t kv_head) {
    const char *cell = row_at(a->v, m->tile.first, kv_head, 0);
    float *to = m->tile.v;
    for (int left = m->tile.cells; left > 0; left -= 1 + a->pair, cell += (1 + a->pair) * a->v->nb[1], to += a->padded) {
        if (left % PANEL == 0) fetch_cells(&m->tile, m->tile.ahead_part);
        const char *row = cell, *next = cell;           // an odd last cell pairs with itself: its partner's probability is 0
        if (a->pair && left > 1) next += a->v->nb[1];
        if (through) {
            row = float_row(a->v->type, a->D, a->padded, row, m->row);
            next = a->pair ? float_row(a->v->type, a->D, a->padded, next, m->row2) : row;
        }
        value_rows(type, a->pair, a->padded, row, next, to);
    }
}
INLINE void load_tile(const attention_args *a, attention_memory *m, int64_t kv_head, int first, int cells) {
    m->tile.first = first;
    m->tile.cells = cells;
    int whole = a->D % (2 * VL) == 0;
    switch (whole ? a->k->type : -1) {
    case TYPE_f32:  load_keys(a, m, TYPE_f32, 0, kv_head); break;
    case TYPE_f16:  load_keys(a, m, TYPE_f16, 0, kv_head); break;
    case TYPE_bf16: load_keys(a, m, TYPE_bf16, 0, kv_head); break;
    default:        load_keys(a, m, TYPE_f32, 1, kv_head);
    }
    switch (whole ? a->v->type : -1) {
    case TYPE_f32:  load_values(a, m, TYPE_f32, 0, kv_head); break;
    case TYPE_f16:  load_values(a, m, TYPE_f16, 0, kv_head); break;
    case TYPE_bf16: load_values(a, m, TYPE_bf16, 0, kv_head); break;
    default:        load_values(a, m, TYPE_f32, 1, kv_head);
    }
}

// Where tile c of a KV head lies, for fetch_cells; a negative head: nowhere.
INLINE void look_ahead(const attention_args *a, kv_tile *t, int64_t kv_head, int64_t c, int64_t end) {
    const pyg_view *cache[2] = {a->k, a->v};
    const int64_t cells = end - c < a->tile ? end - c : a->tile;
    for (int i = 0; i < 2; i++) {
        const char *at = fetch_streams && kv_head >= 0 ? row_at(cache[i], c, kv_head, 0) : NULL;
        t->ahead[i] = (memory_ahead){at, at ? at + cells * cache[i]->nb[1] : NULL};
    }
    t->ahead_part = round_up(a->tile * a->k->nb[1] / AHEAD_PARTS, LINE);
}

// then_head, then: where the worker goes on afterwards, at a KV head and a cell (-1: it does not)
INLINE void attend_cells(const attention_args *a, attention_memory *m, int64_t kv_head, int64_t n_groups, int64_t from, int64_t end,
                         int64_t then_head, int64_t then) {
    for (int64_t c = from; c < end; c += a->tile) {
        const int last = c + a->tile >= end;
        look_ahead(a, &m->tile, last ? then_head : kv_head, last ? then : c + a->tile, last ? then + a->tile : end);
        load_tile(a, m, kv_head, (int)c, (int)(end - c < a->tile ? end - c : a->tile));
        for (int64_t i = 0; i < n_groups; i++) (a->pair ? attend_pairs : attend_floats)(&m->groups[i], &m->tile, a->softcap);
        fetch_cells(&m->tile, INT64_MAX);
    }
}

// What a head's sink adds to the sum of its weights, which are relative to the largest score: a score that no value has.
INLINE float sink_weight(const attention_args *a, int64_t head, float max) { return a->sinks ? exp2f(a->sinks[head] * LOG2_E - max) : 0.0f; }

INLINE void write_group(const attention_args *a, const query_group *g, int64_t t0, int64_t kv_head) {
    for (int r = 0; r < g->rows; r++) {
        int64_t t = t0 + (g->first_row + r) / a->share, head = kv_head * a->share + (g->first_row + r) % a->share;
        float *to = (float *)row_at(a->dst, t, 0, 0) + head * a->D, sum = g->sum[r * g->rep] + sink_weight(a, head, g->max[r * g->rep]);
        float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;     // a token that sees nothing gets zeros
        gather_row(g, r, a->D, g->out, inverse, to);
    }
}

// ---- one unit through a matrix unit --------------------------------------------------------------------------------------------------
INLINE int64_t unit_tokens(const attention_args *a) { return a->share < UNIT_ROWS ? UNIT_ROWS / a->share : 1; }
INLINE int64_t square_layout(square_memory *m, const attention_args *a, char *base) {
    uintptr_t at = (uintptr_t)base;
    const int64_t rows = round_up(unit_tokens(a) * a->share, BLOCK_ROWS), padded = round_up(a->D, MATRIX_DEPTH);
    m->steps = padded / MATRIX_DEPTH;
    m->q = take(&at, rows * padded * 2);
    m->out = take(&at, rows * padded * sizeof(float));
    m->sum = take(&at, rows * VL * sizeof(float));
    m->max = take(&at, rows * sizeof(float));
    m->lo = take(&at, rows * sizeof(int32_t));
    m->hi = take(&at, rows * sizeof(int32_t));
    m->k = take(&at, TILE_CELLS * padded * 2);
    m->v = take(&at, TILE_CELLS * padded * 2);
    for (int i = 0; i < 2; i++) {
        m->p[i] = take(&at, TILE_CELLS * BLOCK_ROWS * 2);
        m->scores[i] = take(&at, TILE_CELLS * BLOCK_ROWS * sizeof(float));
    }
    m->blocks = take(&at, rows / BLOCK_ROWS * sizeof *m->blocks);
    m->seeing = take(&at, rows / BLOCK_ROWS * sizeof *m->seeing);
    m->rows = take(&at, MATRIX_SIDE * padded * sizeof(float));
    m->zeros = take(&at, padded * sizeof(float));
    return (int64_t)(at - (uintptr_t)base);
}
static void attend_squares(const attention_args *a, square_memory *m, int64_t kv_head, int64_t t0, int64_t t1) {
    const int64_t rows = (t1 - t0) * a->share, end = a->cell[t1 - 1] + 1;
    const float scale = a->softcap > 0.0f ? a->scale / a->softcap : a->scale * LOG2_E;
    for (int64_t r = 0, t = t0; t < t1; t++)
        for (int64_t i = 0; i < a->share; i++, r++)
            load_query(m, r, (const float *)row_at(a->q, kv_head * a->share + i, t, 0), a->D, scale, first_visible(a, t), a->cell[t]);
    int blocks = 0;
    for (int64_t r = 0; r < rows; r += BLOCK_ROWS) m->blocks[blocks++] = block_at(m, r, rows);
    memset(m->out, 0, blocks * BLOCK_ROWS * m->steps * MATRIX_DEPTH * sizeof(float));
    for (int64_t c = first_of_its(a, t0, TILE_CELLS); c < end; c += TILE_CELLS) {
        m->first = (int)c;
        load_squares(a->k, a->D, kv_head, end - c, m, 0);
        load_squares(a->v, a->D, kv_head, end - c, m, 1);
        attend_tile(m, blocks, a->softcap);
    }
    for (int64_t r = 0, t = t0; t < t1; t++)
        for (int64_t i = 0; i < a->share; i++, r++)
            store_result(m, r, a->D, sink_weight(a, kv_head * a->share + i, m->max[r]), (float *)row_at(a->dst, t, 0, 0) + (kv_head * a->share + i) * a->D);
}

// ---- attention -----------------------------------------------------------------------------------------------------------------------
static void attend_run(const attention_args *a, attention_memory *m, int64_t kv_head, int64_t t0, int64_t t1) {
    int64_t n = cut_groups(a, m, t0, t1, m->state);
    for (int64_t i = 0; i < n; i++) load_group(a, m, &m->groups[i], t0, kv_head, NULL, 0, 0);
    attend_cells(a, m, kv_head, n, first_of_its(a, t0, a->tile), a->cell[t1 - 1] + 1, -1, 0);
    for (int64_t i = 0; i < n; i++) write_group(a, &m->groups[i], t0, kv_head);
}

static void op_attention(worker *w, const pyg_step *s) {
    attention_args a = attention_shape(w->plan->views, s, s->src[5], s->i[1], s->i[2]);
    attention_memory m;
    square_memory q;
    matrix_shape before;
    int64_t used = attention_layout(&m, &a, w->scratch, a.squares ? 0 : unit_tokens(&a) * a.share, 1, a.tokens), runs = 0;
    for (int64_t t = 0; t < a.tokens; t = run_end(&a, t, unit_tokens(&a))) m.run_start[runs++] = (int32_t)t;
    m.run_start[runs] = (int32_t)a.tokens;
    if (a.squares) {
        square_layout(&q, &a, w->scratch + used);
        memset(q.zeros, 0, q.steps * MATRIX_DEPTH * sizeof(float));
        matrix_begin(&before);
    }
    for (int64_t chunk; (chunk = claim(w, a.kv_heads * runs)) < a.kv_heads * runs;) {
        int64_t kv_head = chunk / runs, run = runs - 1 - chunk % runs;      // a head's longest runs first
        if (a.squares) attend_squares(&a, &q, kv_head, m.run_start[run], m.run_start[run + 1]);
        else attend_run(&a, &m, kv_head, m.run_start[run], m.run_start[run + 1]);
    }
    if (a.squares) matrix_end(&before);
}
static int64_t scratch_attention(const pyg_plan *plan, const pyg_step *s) {
    attention_args a = attention_shape(plan->views, s, s->src[5], s->i[1], s->i[2]);
    attention_memory m;
    square_memory q;
    const int64_t few = attention_layout(&m, &a, NULL, unit_tokens(&a) * a.share, 1, a.tokens);
    return a.squares ? most(few, attention_layout(&m, &a, NULL, 0, 1, a.tokens) + square_layout(&q, &a, NULL)) : few;
}

// ---- attention_step --------------------------------------------------------------------------------------------------------------------
typedef struct {                        // the cells that the step's tokens see, cut into splits of equal length
    int64_t from, end, length, count;
} cell_splits;

INLINE int64_t split_length(const attention_args *a) {
    int64_t length = round_up((a->k->ne[1] + MAX_SPLITS - 1) / MAX_SPLITS, TILE_CELLS);
    return length > SPLIT_CELLS ? length : SPLIT_CELLS;
}
static cell_splits split_cells(const attention_args *a) {
    cell_splits p = {INT64_MAX, 0, split_length(a), 0};
    for (int64_t t = 0; t < a->tokens; t++) {
        int64_t lo = first_of_its(a, t, p.length), hi = a->cell[t];
        lo = lo < hi ? lo : hi;
        p.from = lo < p.from ? lo : p.from;
        p.end = hi + 1 > p.end ? hi + 1 : p.end;
    }
    p.count = (p.end - p.from + p.length - 1) / p.length;
    return p;
}

// The new tokens' keys and values whose cells lie in from .. end: the unit that reads a cell is the one that writes it.
INLINE void store_cells(worker *w, const pyg_step *s, const attention_args *a, attention_memory *m, int64_t kv_head, int64_t from, int64_t end) {
    const pyg_view *k = view_of(w, s->src[5]), *v = view_of(w, s->src[6]), *table = view_of(w, s->src[7]);
    for (int64_t t = 0; t < a->tokens; t++) {
        if (a->cell[t] < from || a->cell[t] >= end) continue;
        const float *key = (const float *)row_at(k, kv_head, t, 0);
        if (table) rope_row(s->i[1], s->i[2], a->D, key, (const float *)row_at(table, 0, t, 0), m->row), key = m->row;
        store_row(a->k->type, a->D, key, row_at(a->k, a->cell[t], kv_head, 0));
        store_row(a->v->type, a->D, (const float *)row_at(v, kv_head, t, 0), row_at(a->v, a->cell[t], kv_head, 0));
    }
}

// Whether a run of tokens t .. end sees cells of split k: with several sequences most runs lie elsewhere.
INLINE int sees_split(const attention_args *a, int64_t t, int64_t end, const cell_splits *p, int64_t k) {
    const int64_t from = p->from + k * p->length, lo = least(first_of_its(a, t, a->tile), a->cell[t]);
    return lo < from + p->length && a->cell[end - 1] >= from;
}

// Joins the splits of one KV head into the first that a run sees and writes the result.
static void merge_splits(const attention_args *a, attention_memory *m, const cell_splits *p, int64_t kv_head, float *states, int64_t state_size) {
    float *state = states + kv_head * p->count * state_size;
    for (int64_t t = 0, end; t < a->tokens; t = end) {
        end = run_end(a, t, a->tokens);
        int64_t n = cut_groups(a, m, t, end, state);
        int64_t first = 0;
        while (!sees_split(a, t, end, p, first)) first++;
        for (int64_t i = 0; i < n; i++) {
            query_group g = m->groups[i];
            g.out += first * state_size, g.max += first * state_size, g.sum += first * state_size;
            for (int64_t k = first + 1; k < p->count && sees_split(a, t, end, p, k); k++) {
                const int64_t to = (k - first) * state_size;
                merge_group(&g, a->padded, g.out, g.max, g.sum, g.out + to, g.max + to, g.sum + to);
            }
            write_group(a, &g, t, kv_head);
        }
        state = state_end(&m->groups[n - 1]);
    }
}

static void op_attention_step(worker *w, const pyg_step *s) {
    attention_args a = attention_shape(w->plan->views, s, s->src[8], s->i[3], 1);
    if (!a.pair) a.tile = TILE_CELLS / 2;               // so that its floats and what is asked for ahead stay in the first-level cache
    cell_splits p = split_cells(&a);
    attention_memory m;
    int64_t used = attention_layout(&m, &a, w->scratch, a.tokens * a.share, a.tokens, 0);
    int64_t state_size = state_floats(&a, a.tokens * a.share, a.tokens);
    // what the workers hand each other lies in worker 0's scratch: the steps before and after this one are behind barriers,
    // because this one reads q, k, v and the next reads its result
    float *states = (float *)(w->team[0].scratch + used);
    const int64_t chunks = a.kv_heads * p.count;
    const int early = claims_early(w, chunks);
    for (int64_t chunk = claim(w, chunks), next = 0; chunk < chunks; chunk = early ? next : claim(w, chunks)) {
        if (early) next = claim(w, chunks);
        const int64_t then_head = early && next < chunks ? next / p.count : -1, then = p.from + next % p.count * p.length;
        int64_t kv_head = chunk / p.count, from = p.from + chunk % p.count * p.length, end = from + p.length;
        if (end > p.end) end = p.end;
        store_cells(w, s, &a, &m, kv_head, from, end);
        float *state = p.count > 1 ? states + chunk * state_size : m.state;
        for (int64_t t = 0, end_of_run; t < a.tokens; t = end_of_run) {
            end_of_run = run_end(&a, t, a.tokens);
            int64_t n = cut_groups(&a, &m, t, end_of_run, state), lo = first_of_its(&a, t, a.tile), hi = a.cell[end_of_run - 1] + 1;
            if (p.count > 1) state = state_end(&m.groups[n - 1]);
            if (!sees_split(&a, t, end_of_run, &p, chunk % p.count)) continue;
            for (int64_t i = 0; i < n; i++) load_group(&a, &m, &m.groups[i], t, kv_head, view_of(w, s->src[7]), s->i[1], s->i[2]);
            attend_cells(&a, &m, kv_head, n, lo > from ? lo : from, hi < end ? hi : end, then_head, then);
            if (p.count == 1)
                for (int64_t i = 0; i < n; i++) write_group(&a, &m.groups[i], t, kv_head);
        }
    }
    if (p.count == 1) return;
    pool_barrier(w);
    for (int64_t kv_head; (kv_head = claim_again(w, a.kv_heads)) < a.kv_heads;) merge_splits(&a, &m, &p, kv_head, states, state_size);
}
static int64_t scratch_attention_step(const pyg_plan *plan, const pyg_step *s) {
    attention_args a = attention_shape(plan->views, s, s->src[8], s->i[3], 1);
    attention_memory m;
    int64_t used = attention_layout(&m, &a, NULL, a.tokens * a.share, a.tokens, 0);
    int64_t splits = (a.k->ne[1] + split_length(&a) - 1) / split_length(&a);
    return used + a.kv_heads * splits * state_floats(&a, a.tokens * a.share, a.tokens) * (int64_t)sizeof(float);
}
