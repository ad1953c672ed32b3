// Flash attention on one KV head: groups of query rows against tiles of cells, the softmax kept online.
//
// A row is one query: one head of those that share the KV head, at one token. Lanes are rows: scores S (cells, rows),
// probabilities P and the transposed result O (D, rows) are vectors over rows, so the softmax never looks across lanes,
// and K and V are used as they lie in the cache:
//
//   S[c] += K[c][d] * Q[d]          K[c][d] the same float in every lane, Q[d] a vector over rows
//   O[d] += V[c][d] * P[c]          likewise
//
// A group with fewer rows than lanes gives each row `rep` neighbouring lanes: these share out d in steps of `rep`, and
// K[c][d .. d + rep) is repeated over the lanes. How many ways a score's sum is cut decides its last bits, so a group may be asked
// to add as one with more lanes per row would: `chains` times `rep` sums, joined in the order in which lanes are. With `pair` (bf16 dot products) a float is a word of two bf16: K and Q pair
// neighbouring d, V and P pair neighbouring cells.

enum { TILE_CELLS = 64, GROUP_VECS = 2, PANEL = VREGS == 32 ? 8 : 4 };
#define NEVER_SEEN (-1e30f)             // running maximum before any cell: finite, so that score - maximum is never NaN
#define LOG2_E 1.44269504088896341f     // scores are kept times this: 2^x is cheaper than e^x

typedef struct {
    int      vecs, rep, rows;           // vecs * VL lanes for `rows` rows of `rep` lanes each (rep > 1 only with one vector)
    int      chains;                    // parts of a score's sum in each lane
    int      first_row;                 // its first row, counted in the run of tokens it belongs to
    float   *q;                         // (words / rep, lanes) scaled queries
    float   *out, *max, *sum;           // (padded D / rep, lanes) unnormalised O; (lanes) running maximum and sum
    int32_t *lo, *hi;                   // (lanes) cells lo .. hi are visible
    int32_t  lo_min, lo_max, hi_min, hi_max;
} query_group;

// Cells of the next tile as they lie in memory, asked for bit by bit while this tile is at work.
typedef struct { const char *at, *end; } memory_ahead;
typedef struct {
    int      first, cells;              // cells first .. first + cells - 1
    int64_t  words, padded;             // of a K row; of a V row
    float   *k, *v;                     // k (cells, words), v (cells or pairs of cells, padded)
    float   *scores;                    // (TILE_CELLS, GROUP_VECS * VL)
    memory_ahead ahead[2];              // keys and values of the tile that comes next
    int64_t  ahead_part;                // bytes of each to ask for at a time
} kv_tile;
enum { AHEAD_PARTS = 32 };              // of a tile: for each PANEL of its cells several times, so that there is always room for more lines
INLINE void fetch_cells(kv_tile *t, int64_t bytes) {
    for (int i = 0; i < 2; i++) {
        memory_ahead *m = &t->ahead[i];
        for (const char *end = m->end - m->at < bytes ? m->end : m->at + bytes; m->at < end; m->at += LINE) __builtin_prefetch(m->at);
    }
}

INLINE int group_lanes(const query_group *g) { return g->vecs * VL; }
// Between a row's own words (or d) and their places in q (or out): `rep` together in every group_lanes.
INLINE void scatter_row(const query_group *g, int row, int64_t n, const float *words, float *to) {
    to += row * g->rep;
    for (int64_t i = 0; i < n; i += g->rep, to += group_lanes(g))
        for (int r = 0; r < g->rep; r++) to[r] = words[i + r];
}
INLINE void gather_row(const query_group *g, int row, int64_t n, const float *from, float factor, float *d) {
    from += row * g->rep;
    for (int64_t i = 0; i < n; i += g->rep, from += group_lanes(g))
        for (int r = 0; r < g->rep && i + r < n; r++) d[i + r] = from[r] * factor;
}

// The most lanes that each of `rows` rows can have in one vector.
INLINE int lanes_per_row(int rows) {
    int rep = 1;
    while (rows * rep * 2 <= VL) rep *= 2;
    return rep;
}

// Cuts the rows from `first_row` on into the next group's shape. parts: of a score's sum (a power of two), 0: as many as there are lanes.
INLINE void shape_group(query_group *g, int first_row, int rows, int parts) {
    g->first_row = first_row;
    g->vecs = rows > VL ? GROUP_VECS : 1;
    g->rows = rows < g->vecs * VL ? rows : g->vecs * VL;
    g->rep = lanes_per_row(g->vecs == 1 ? g->rows : VL);
    if (parts && g->rep > parts) g->rep = parts;
    g->chains = parts ? parts / g->rep : 1;
}

// acc[j][v] += sum over k < n of a[j * a_j + k * a_k] * b[k * b_k][v]: the one inner loop. J, V, REP and pair are constants.
INLINE void panel(int J, int V, int REP, int pair, const float *a, int64_t a_j, int64_t a_k, const float *b, int64_t b_k, int64_t n, vf *acc) {
    for (int64_t k = 0; k < n; k++) {
        vf column[GROUP_VECS];
        for (int v = 0; v < V; v++) column[v] = vf_load(b + (k * b_k * V + v) * VL);
        #pragma GCC unroll 8
        for (int j = 0; j < J; j++) {
            vf x = vf_repeat(a + j * a_j + k * a_k, REP);
            for (int v = 0; v < V; v++) acc[j * V + v] = pair ? vf_dot_bf16(acc[j * V + v], x, column[v]) : vf_fma(x, column[v], acc[j * V + v]);
        }
    }
}

// The same scores, each the sum of `chains` sums over every chains-th word.
INLINE void tile_scores_chained(int V, int REP, int pair, const query_group *g, const float *k, int64_t words, int cells, float *S) {
    const int chains = g->chains;
    for (int c = 0; c < cells; c += PANEL) {
        vf part[VL][PANEL * GROUP_VECS];
        for (int i = 0; i < chains; i++) {
            vf acc[PANEL * GROUP_VECS] = {{0}};
            panel(PANEL, V, REP, pair, k + c * words + i * REP, words, chains * REP, g->q + i * V * VL, chains, words / (chains * REP), acc);
            for (int j = 0; j < PANEL * V; j++) part[i][j] = vf_group_sum(acc[j], REP);
        }
        for (int n = chains / 2; n > 0; n /= 2)
            for (int i = 0; i < n; i++)
                for (int j = 0; j < PANEL * V; j++) part[i][j] = part[2 * i][j] + part[2 * i + 1][j];
        for (int j = 0; j < PANEL * V; j++) vf_store(S + (c * V + j) * VL, part[0][j]);
    }
}

// S (cells rounded up to PANEL, lanes)
INLINE void tile_scores(int V, int REP, int pair, const query_group *g, kv_tile *t, int cells) {
    const float *k = t->k;
    const int64_t words = t->words;
    float *S = t->scores;
    if (g->chains > 1) { tile_scores_chained(V, REP, pair, g, k, words, cells, S); return; }
    for (int c = 0; c < cells; c += PANEL) {
        fetch_cells(t, t->ahead_part);
        vf acc[PANEL * GROUP_VECS] = {{0}};
        panel(PANEL, V, REP, pair, k + c * words, words, REP, g->q, 1, words / REP, acc);
        #pragma GCC unroll 16
        for (int i = 0; i < PANEL * V; i++) vf_store(S + (c * V + i) * VL, vf_group_sum(acc[i], REP));
    }
}

// S -> P relative to the new running maximum; `rescale` is what the old sums must be multiplied with.
INLINE void tile_softmax(int V, int pair, query_group *g, kv_tile *t, int cells, int masked, float softcap, vf *rescale) {
    float *S = t->scores;
    const int c0 = t->first;
    for (int v = 0; v < V; v++) {
        vi lo = vi_load(g->lo + v * VL), hi = vi_load(g->hi + v * VL);
        vf old = vf_load(g->max + v * VL), max = old, sum = {0};
        for (int c = 0; c < cells; c++) {
            vf s = vf_load(S + (c * V + v) * VL);
            if (softcap > 0.0f) s = vf_tanh(s) * (softcap * LOG2_E);
            if (masked) s = vf_select((vi)(lo <= c0 + c) & (vi)(hi >= c0 + c), s, vf_set(-INFINITY));
            if (masked || softcap > 0.0f) vf_store(S + (c * V + v) * VL, s);
            max = vf_max(max, s);
        }
        if (pair && cells % 2) vf_store(S + (cells * V + v) * VL, vf_set(-INFINITY));
        for (int c = 0; c < cells; c += 1 + pair) {
            if (c % PANEL == 0) fetch_cells(t, t->ahead_part);
            vf p = vf_exp2_below(vf_load(S + (c * V + v) * VL) - max, pair);
            sum += p;
            if (pair) {
                vf next = vf_exp2_below(vf_load(S + ((c + 1) * V + v) * VL) - max, pair);
                sum += next;
                p = vf_pair_bf16(p, next);
            }
            vf_store(S + (c / (1 + pair) * V + v) * VL, p);
        }
        rescale[v] = vf_exp2_below(old - max, 0);
        vf_store(g->max + v * VL, max);
        vf_store(g->sum + v * VL, vf_fma(vf_load(g->sum + v * VL), rescale[v], sum));
    }
}

INLINE void tile_output(int J, int V, int REP, int pair, query_group *g, const float *values, int64_t padded, const float *P, int64_t n, int64_t d,
                        const vf *rescale) {
    float *out = g->out + d / REP * V * VL;
    vf acc[PANEL * GROUP_VECS];
    #pragma GCC unroll 16
    for (int i = 0; i < J * V; i++) acc[i] = vf_load(out + i * VL) * rescale[i % V];
    panel(J, V, REP, pair, values + d, REP, padded, P, 1, n, acc);
    #pragma GCC unroll 16
    for (int i = 0; i < J * V; i++) vf_store(out + i * VL, acc[i]);
}

INLINE void attend_shape(int V, int REP, int pair, query_group *g, kv_tile *t, int masked, float softcap) {
    vf rescale[GROUP_VECS];
    int cells = t->first + t->cells - 1 > g->hi_max ? g->hi_max - t->first + 1 : t->cells;      // the rest nobody sees
    tile_scores(V, REP, pair, g, t, cells);
    tile_softmax(V, pair, g, t, cells, masked, softcap, rescale);
    int64_t d = 0, n = pair ? (cells + 1) / 2 : cells;
    for (; d + PANEL * REP <= t->padded; d += PANEL * REP) {
        fetch_cells(t, 2 * t->ahead_part);
        tile_output(PANEL, V, REP, pair, g, t->v, t->padded, t->scores, n, d, rescale);
    }
    for (; d + PANEL / 2 * REP <= t->padded; d += PANEL / 2 * REP) tile_output(PANEL / 2, V, REP, pair, g, t->v, t->padded, t->scores, n, d, rescale);
    for (; d < t->padded; d += REP) tile_output(1, V, REP, pair, g, t->v, t->padded, t->scores, n, d, rescale);
}

// One group against one tile; tiles that no row sees are skipped.
INLINE void attend_group(int pair, query_group *g, kv_tile *t, float softcap) {
    if (t->first > g->hi_max || t->first + t->cells <= g->lo_min) return;
    int masked = t->first < g->lo_max || t->first + t->cells - 1 > g->hi_min;
    if (g->vecs == GROUP_VECS) { attend_shape(GROUP_VECS, 1, pair, g, t, masked, softcap); return; }
    switch (g->rep) {
    case 1: attend_shape(1, 1, pair, g, t, masked, softcap); break;
    case 2: attend_shape(1, 2, pair, g, t, masked, softcap); break;
    case 4: attend_shape(1, 4, pair, g, t, masked, softcap); break;
    case 8: if (VL >= 8) attend_shape(1, 8, pair, g, t, masked, softcap); break;
    case 16: if (VL >= 16) attend_shape(1, 16, pair, g, t, masked, softcap); break;
    }
}
static void attend_floats(query_group *g, kv_tile *t, float softcap) { attend_group(0, g, t, softcap); }
static void attend_pairs(query_group *g, kv_tile *t, float softcap) { attend_group(1, g, t, softcap); }

// ---- cache rows as a tile wants them ----------------------------------------------------------------------------------------------
// Lanes i .. i + VL of a row of floats of any width; `type` is a constant.
INLINE vf cache_vector(int type, const char *row, int64_t i) {
    return type == TYPE_f16 ? vf_from_f16(row + 2 * i) : type == TYPE_bf16 ? vf_from_bf16(row + 2 * i) : vf_load(row + 4 * i);
}
INLINE void key_row(int type, int pair, int64_t words, const char *row, float *to) {
    for (int64_t i = 0; i < words; i += VL)
        vf_store(to + i, pair ? vf_pack_bf16(cache_vector(type, row, 2 * i), cache_vector(type, row, 2 * i + VL)) : cache_vector(type, row, i));
}
INLINE void value_rows(int type, int pair, int64_t padded, const char *row, const char *next, float *to) {
    for (int64_t i = 0; i < padded; i += VL)
        vf_store(to + i, pair ? vf_pair_bf16(cache_vector(type, row, i), cache_vector(type, next, i)) : cache_vector(type, row, i));
}

// n weights of any type as floats, then zeros up to `padded`
INLINE const char *float_row(int type, int64_t n, int64_t padded, const char *from, float *row) {
    dequantize_row(type, n, from, row);
    for (int64_t i = n; i < padded; i++) row[i] = 0.0f;
    return (const char *)row;
}

INLINE void merge_group(const query_group *g, int64_t padded, float *out, float *max, float *sum, const float *out2, const float *max2, const float *sum2) {
    int lanes = group_lanes(g);
    for (int v = 0; v < lanes; v += VL) {
        vf a = vf_load(max + v), b = vf_load(max2 + v), top = vf_max(a, b);
        vf fa = vf_exp2_below(a - top, 0), fb = vf_exp2_below(b - top, 0);
        vf_store(max + v, top);
        vf_store(sum + v, vf_load(sum + v) * fa + vf_load(sum2 + v) * fb);
        for (int64_t i = v; i < padded / g->rep * lanes; i += lanes) vf_store(out + i, vf_load(out + i) * fa + vf_load(out2 + i) * fb);
    }
}
