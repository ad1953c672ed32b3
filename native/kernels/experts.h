// Matmuls of a mixture of experts: each token meets the weights of the experts that were chosen for it.
//
// A pair is a token and one of its slots, number t * U + u. Pairs are sorted by expert, and an expert's pairs form batches of up
// to a chunk's columns. A worker gathers and prepares a batch in its scratch memory and keeps it for the batch's next row tiles.
#pragma once

enum { BATCH = MATRIX_UNIT ? WIDE_BLOCK : (SPREADS ? SPREAD_BLOCK : COLUMN_BLOCK) * SMALL_COLS };

typedef struct {
    int64_t experts, pairs, per_token;
    int32_t *first;              // [experts + 1]: where an expert's pairs start in `order`
    int32_t *order;              // [pairs]: pair numbers, by expert
    int64_t batches;
} routing;

static int64_t routing_bytes(int64_t experts, int64_t pairs) { return (experts + 2 + pairs) * (int64_t)sizeof(int32_t) + LINE; }

static int32_t expert_of(const pyg_view *ids, int64_t pair) {
    return *(const int32_t *)(row_at(ids, pair / ids->ne[0], 0, 0) + pair % ids->ne[0] * ids->nb[0]);
}

static routing sort_pairs(const pyg_view *ids, int64_t experts, char *memory) {
    routing r = {.experts = experts, .pairs = ids->ne[0] * ids->ne[1], .per_token = ids->ne[0], .first = (int32_t *)memory};
    r.order = r.first + experts + 2;
    memset(r.first, 0, (experts + 2) * sizeof *r.first);
    for (int64_t p = 0; p < r.pairs; p++) r.first[2 + expert_of(ids, p)]++;
    for (int64_t e = 0; e < experts; e++) {
        r.batches += div_up(r.first[2 + e], BATCH);
        r.first[2 + e] += r.first[1 + e];
    }
    for (int64_t p = 0; p < r.pairs; p++) r.order[r.first[1 + expert_of(ids, p)]++] = (int32_t)p;
    return r;
}

// Batch number b: its expert and its pairs.
typedef struct { int64_t expert, first, count; } batch;
static batch batch_at(const routing *r, int64_t b) {
    for (int64_t e = 0;; e++) {
        int64_t n = r->first[e + 1] - r->first[e], batches = div_up(n, BATCH);
        if (b < batches) return (batch){e, r->first[e] + b * BATCH, least(BATCH, n - b * BATCH)};
        b -= batches;
    }
}

// The batch's columns of x, prepared in `acts`.
static void gather(const pyg_view *x, act_norm norm, int layout, const routing *r, const batch *b, char *acts) {
    const int64_t column_bytes = act_column_bytes(layout, x->ne[0]);
    const int shared = x->ne[2] == 1 && r->pairs != x->ne[1];            // x (T, K): the slots of a token share its column
    const int width = act_width(layout, b->count);
    for (int64_t c = 0; c < b->count; c += width) {
        const char *columns[MATRIX_SIDE];
        const int N = (int)least(width, b->count - c);
        for (int n = 0; n < N; n++) {
            int64_t pair = r->order[b->first + c + n];
            columns[n] = column_at(x, shared ? pair / r->per_token : pair);
        }
        act_tile(layout, columns, norm, x->ne[0], acts + c * column_bytes, N);
    }
}

// bias: of each matrix, (E, M) or NULL
static void matmul_id(worker *w, const pyg_step *s, const pyg_view *second, epilogue finish, const pyg_view *const bias[2]) {
    const pyg_view *weight = view_of(w, s->src[0]), *x = view_of(w, s->src[1]), *ids = view_of(w, s->src[3]);
    const int64_t tiles = tile_count(weight->ne[1]);
    char *memory = w->scratch + scratch_tiles(weight, second ? second : weight, s->i[1]);
    const routing r = sort_pairs(ids, weight->ne[2], memory);
    char *acts = memory + routing_bytes(r.experts, r.pairs);
    job j = {.matrices = second ? 2 : 1, .then = INT64_MAX, .finish = finish, .to = {view_of(w, s->dst), NULL, NULL}};
    const int most_cols = act_layout(s->i[1], r.pairs);                  // a batch may have fewer, and then another layout
    const chunking c = chunks_of(w, tiles * r.batches, j.matrices, matrix_of(weight, 0, most_cols).bytes, most_cols, 1, 0);
    const int64_t group = least(c.group, tiles), groups = div_up(tiles, group);
    batch b = {0};
    for (int64_t i, held = -1; (i = claim(w, r.batches * groups)) < r.batches * groups;) {
        if (held != i / groups) {
            held = i / groups;
            b = batch_at(&r, held);
            j.layout = act_layout(s->i[1], b.count);
            j.spread = takes_spread(s->i[1], b.count);
            j.m[0] = matrix_of(weight, b.expert, j.layout);
            if (second) j.m[1] = matrix_of(second, b.expert, j.layout);
            for (int m = 0; m < 2; m++) j.finish.bias[m] = bias[m] ? (const float *)row_at(bias[m], b.expert, 0, 0) : NULL;
            j.to.map = r.order + b.first;
            gather(x, norm_of(w, s, 2), j.layout, &r, &b, acts);
        }
        const int64_t first = i % groups * group;
        run_tiles(w, &j, first, least(first + group, tiles), acts, b.count, 0, act_tiles(j.layout, b.count));
    }
}

static void op_mul_mat_id(worker *w, const pyg_step *s) {
    matmul_id(w, s, NULL, (epilogue){.glu = -1, .scale = 1.0f}, (const pyg_view *const[2]){view_of(w, s->src[4]), NULL});
}
static void op_glu_mat_id(worker *w, const pyg_step *s) {
    epilogue e = {.glu = s->i[3], .scale = 1.0f};
    matmul_id(w, s, view_of(w, s->src[4]), e, (const pyg_view *const[2]){view_of(w, s->src[5]), view_of(w, s->src[6])});
}

static int64_t scratch_mul_mat_id(const pyg_plan *plan, const pyg_step *s) {
    const pyg_view *weight = &plan->views[s->src[0]], *ids = &plan->views[s->src[3]];
    const pyg_view *second = s->op == OP_glu_mat_id ? &plan->views[s->src[4]] : weight;
    const int64_t pairs = ids->ne[0] * ids->ne[1];
    return scratch_tiles(weight, second, s->i[1]) + routing_bytes(weight->ne[2], pairs) + act_bytes(s->i[1], weight->ne[0], least(pairs, BATCH));
}
