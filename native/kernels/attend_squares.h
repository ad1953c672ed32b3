// The same with a matrix unit (simd.h): blocks of 32 query rows against tiles of 64 cells, in squares of bf16.
//
//            K: 4 x steps squares of [d / 2][16 cells][2]             V: 2 * steps x 2 squares of [cells / 2][16 d][2]
//              64 cells                                                 D
//     D      +----------+                                    64 cells +----------+
//            +----------+                                             |          |
//      D                                            64 cells          +----------+
//   +------+ +----------+                          +----------+       +----------+
//   | 32 Q | |    S     |  -- softmax by rows -->  |    P     |       |   O +=   |
//   +------+ +----------+                          +----------+       +----------+
//
// Here a row is a row: a lane is a cell in S and P and a part of the head in O, which is what the unit reads and writes. A row's maximum
// is then taken across lanes once a tile, its sum once a run. Heads are filled up to a multiple of 32 and tiles to 64 cells, with zeros;
// rows beyond the last hold noise, which stays in its row.
#pragma once

enum { BLOCK_ROWS = 2 * MATRIX_SIDE, SQUARE_FLOATS = MATRIX_SIDE * MATRIX_SIDE, TILE_STEPS = TILE_CELLS / MATRIX_DEPTH };
_Static_assert(!MATRIX_UNIT || (int)VL == (int)MATRIX_SIDE, "a line of a square is one vector");
// By how much (in powers of two) scores may exceed the maximum that a row's O and sum are relative to before these are rescaled.
#define MAX_SLACK 8.0f

typedef struct { int64_t first; int rows; int32_t lo_min, lo_max, hi_min, hi_max; } query_block;
typedef struct {
    int64_t  steps;                     // squares along a head
    char    *q;                         // per block, (2 x 16 rows, steps) squares
    float   *out;                       // per block, (steps) x 2 x 2 squares: O, unnormalised
    float   *sum, *max;                 // of each row; the sum in VL parts
    int32_t *lo, *hi;                   // cells lo .. hi are visible
    query_block *blocks, **seeing;      // seeing: those of which a row sees the tile
    int      first;                     // the tile: cells from `first` on
    char    *k, *v, *p[2];              // P of two blocks, see attend_tile
    float   *scores[2];                 // S likewise: c of matrix_block, for 32 cells and for 32 more
    float   *rows, *zeros;              // 16 rows of a cache in floats; what stands for a row that it lacks
} square_memory;

// 16 rows of 32 values, as pairs of bf16, become a square with a column of pairs for each row.
INLINE void transposed_square(int type, const char *const rows[MATRIX_SIDE], int64_t d, char *square) {
    vf line[VL], next[VL];
    for (int i = 0; i < VL; i++) line[i] = vf_pack_bf16(cache_vector(type, rows[i], d), cache_vector(type, rows[i], d + VL));
    #pragma GCC unroll 4
    for (int n = 1; n < VL; n *= 2) {   // each time the last bit of a lane's number becomes the last of its line's
        for (int i = 0; i < VL / 2; i++) {
            next[2 * i] = vf_zip_low(line[i], line[i + VL / 2]);
            next[2 * i + 1] = vf_zip_high(line[i], line[i + VL / 2]);
        }
        for (int i = 0; i < VL; i++) line[i] = next[i];
    }
    for (int i = 0; i < VL; i++) vf_store(square + LINE * i, line[i]);
}

// Cells 16 * part .. 16 * part + 15 of a tile.
INLINE void key_squares(int type, const char *const rows[MATRIX_SIDE], int part, square_memory *m) {
    for (int64_t i = 0; i < m->steps; i++) transposed_square(type, rows, i * MATRIX_DEPTH, m->k + (part * m->steps + i) * MATRIX_SQUARE);
}
INLINE void value_squares(int type, const char *const rows[MATRIX_SIDE], int part, square_memory *m) {
    char *to = m->v + part / 2 * MATRIX_SQUARE + part % 2 * MATRIX_SQUARE / 2;
    for (int64_t i = 0; i < 2 * m->steps; i++, to += TILE_STEPS * MATRIX_SQUARE)
        for (int c = 0; c < MATRIX_SIDE; c += 2)
            vf_store(to + LINE * c / 2, vf_pair_bf16(cache_vector(type, rows[c], i * VL), cache_vector(type, rows[c + 1], i * VL)));
}

// One KV head's rows of the cells of the tile; there are `cells` of them. type: of the cache, or f32 where its rows go through floats.
INLINE void cache_squares(int type, const pyg_view *cache, int64_t D, int64_t kv_head, int64_t cells, square_memory *m, int values) {
    const int64_t padded = m->steps * MATRIX_DEPTH;
    for (int part = 0; part < TILE_CELLS / MATRIX_SIDE; part++) {
        const char *rows[MATRIX_SIDE];
        for (int i = 0; i < MATRIX_SIDE; i++) {
            const int64_t c = part * MATRIX_SIDE + i;
            rows[i] = c < cells ? row_at(cache, m->first + c, kv_head, 0) : (const char *)m->zeros;
            if (type == TYPE_f32 && c < cells) rows[i] = float_row(cache->type, D, padded, rows[i], m->rows + i * padded);
        }
        if (values) value_squares(type, rows, part, m);
        else key_squares(type, rows, part, m);
    }
}
INLINE void load_squares(const pyg_view *cache, int64_t D, int64_t kv_head, int64_t cells, square_memory *m, int values) {
    switch (D % MATRIX_DEPTH == 0 ? cache->type : -1) {
    case TYPE_f16:  cache_squares(TYPE_f16, cache, D, kv_head, cells, m, values); break;
    case TYPE_bf16: cache_squares(TYPE_bf16, cache, D, kv_head, cells, m, values); break;
    default:        cache_squares(TYPE_f32, cache, D, kv_head, cells, m, values);
    }
}

INLINE char *row_in_squares(char *squares, int64_t steps, int64_t row) {
    return squares + row / MATRIX_SIDE * steps * MATRIX_SQUARE + row % MATRIX_SIDE * LINE;
}
// A query of D floats times `scale`, which sees cells lo .. hi.
INLINE void load_query(square_memory *m, int64_t row, const float *query, int64_t D, float scale, int32_t lo, int32_t hi) {
    char *to = row_in_squares(m->q, m->steps, row);
    for (int64_t d = 0; d < D; d += MATRIX_DEPTH, to += MATRIX_SQUARE) {
        vf half[2];
        for (int i = 0; i < 2; i++) {
            const int64_t at = d + i * VL, left = D - at;
            half[i] = (left >= VL ? vf_load(query + at) : left > 0 ? vf_load_first(query + at, left) : vf_set(0.0f)) * scale;
        }
        vf_store(to, vf_pack_bf16(half[0], half[1]));
    }
    vf_store(m->sum + row * VL, vf_set(0.0f));
    m->max[row] = NEVER_SEEN;
    m->lo[row] = lo, m->hi[row] = hi;
}

// Where the lines of row r of a block lie in O: `steps` times two of them.
INLINE float *out_line(const square_memory *m, int64_t row, int64_t step, int half) {
    return m->out + (row / BLOCK_ROWS * m->steps + step) * 4 * SQUARE_FLOATS + (row % BLOCK_ROWS / MATRIX_SIDE * 2 + half) * SQUARE_FLOATS
           + row % MATRIX_SIDE * VL;
}
INLINE void rescale_row(square_memory *m, int64_t row, float max) {
    vf factor = vf_exp2_below(vf_set(m->max[row] - max), 0);
    vf_store(m->sum + row * VL, vf_load(m->sum + row * VL) * factor);
    for (int64_t i = 0; i < m->steps; i++)
        for (int half = 0; half < 2; half++) vf_store(out_line(m, row, i, half), vf_load(out_line(m, row, i, half)) * factor);
    m->max[row] = max;
}

// S -> P of `rows` rows from row `first` on.
INLINE void softmax_rows(square_memory *m, const float *scores, char *p, int64_t first, int rows, int masked, float softcap) {
    enum { N = TILE_CELLS / MATRIX_SIDE };
    int32_t number[TILE_CELLS];
    vi cell[N];
    for (int i = 0; i < TILE_CELLS; i++) number[i] = m->first + i;
    for (int i = 0; i < N; i++) cell[i] = vi_load(number + i * VL);
    for (int r = 0; r < rows; r++) {
        const float *S = scores + r / MATRIX_SIDE * 2 * SQUARE_FLOATS + r % MATRIX_SIDE * VL;
        vf s[N], max;
        #pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            s[i] = vf_load(S + i / 2 * 4 * SQUARE_FLOATS + i % 2 * SQUARE_FLOATS);
            if (softcap > 0.0f) s[i] = vf_tanh(s[i]) * (softcap * LOG2_E);
            if (masked) s[i] = vf_select((vi)(cell[i] >= m->lo[first + r]) & (vi)(cell[i] <= m->hi[first + r]), s[i], vf_set(-INFINITY));
            max = i ? vf_max(max, s[i]) : s[i];
        }
        const float top = vf_hmax(max);
        if (top > m->max[first + r] + MAX_SLACK) rescale_row(m, first + r, top);
        vf sum = vf_load(m->sum + (first + r) * VL), base = vf_set(m->max[first + r]);
        #pragma GCC unroll 4
        for (int i = 0; i < N; i++) sum += s[i] = vf_exp2_below(s[i] - base, 1);
        char *to = row_in_squares(p, TILE_STEPS, r);
        #pragma GCC unroll 4
        for (int i = 0; i < N; i += 2) vf_store(to + i / 2 * MATRIX_SQUARE, vf_pack_bf16(s[i], s[i + 1]));
        vf_store(m->sum + (first + r) * VL, sum);
    }
}

INLINE query_block block_at(const square_memory *m, int64_t first, int64_t rows) {
    query_block b = {first, (int)(rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS), INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};
    for (int64_t r = first; r < first + b.rows; r++) {
        b.lo_min = m->lo[r] < b.lo_min ? m->lo[r] : b.lo_min, b.lo_max = m->lo[r] > b.lo_max ? m->lo[r] : b.lo_max;
        b.hi_min = m->hi[r] < b.hi_min ? m->hi[r] : b.hi_min, b.hi_max = m->hi[r] > b.hi_max ? m->hi[r] : b.hi_max;
    }
    return b;
}
INLINE void block_scores(const square_memory *m, const query_block *b, float *scores) {
    const int64_t keys = m->steps * MATRIX_SQUARE;
    const char *q = m->q + b->first / MATRIX_SIDE * keys;
    for (int i = 0; i < 2 * TILE_STEPS; i += 2, scores += 4 * SQUARE_FLOATS) {
        const matrix_sums to = squares_at(scores);
        matrix_block(1, (const char *const[]){q, q + keys}, (const char *const[]){m->k + i * keys, m->k + (i + 1) * keys}, m->steps, NULL, &to);
    }
}
INLINE void block_softmax(square_memory *m, const query_block *b, const float *scores, char *p, float softcap) {
    const int masked = m->first < b->lo_max || m->first + TILE_CELLS - 1 > b->hi_min;
    if (softcap > 0.0f) softmax_rows(m, scores, p, b->first, b->rows, 1, softcap);
    else if (masked) softmax_rows(m, scores, p, b->first, b->rows, 1, 0.0f);
    else softmax_rows(m, scores, p, b->first, b->rows, 0, 0.0f);
}
INLINE void block_output(const square_memory *m, const query_block *b, const char *p) {
    const int64_t values = TILE_STEPS * MATRIX_SQUARE;
    float *out = m->out + b->first / BLOCK_ROWS * m->steps * 4 * SQUARE_FLOATS;
    for (int64_t i = 0; i < 2 * m->steps; i += 2, out += 4 * SQUARE_FLOATS) {
        const matrix_sums sums = squares_at(out);
        matrix_block(1, (const char *const[]){p, p + values}, (const char *const[]){m->v + i * values, m->v + (i + 1) * values}, TILE_STEPS, &sums, &sums);
    }
}

// All blocks against the tile, but for those of which no row sees it. While vectors work on one block the unit has the scores of the next
// and the output of the one before to do: what goes from the one to the other in memory takes its time to arrive.
static void attend_tile(square_memory *m, int blocks, float softcap) {
    int n = 0;
    for (int i = 0; i < blocks; i++)
        if (m->first <= m->blocks[i].hi_max && m->first + TILE_CELLS > m->blocks[i].lo_min) m->seeing[n++] = &m->blocks[i];
    for (int i = 0; i < n + 2; i++) {
        const int even = i % 2, odd = !even;
        if (i < n) block_scores(m, m->seeing[i], m->scores[even]);
        if (i >= 2) block_output(m, m->seeing[i - 2], m->p[even]);
        if (i >= 1 && i <= n) block_softmax(m, m->seeing[i - 1], m->scores[odd], m->p[odd], softcap);
    }
}

// D floats; a token that sees nothing gets zeros.
INLINE void store_result(const square_memory *m, int64_t row, int64_t D, float sink, float *to) {
    const float sum = vf_sum(vf_load(m->sum + row * VL)) + sink, inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int64_t d = 0; d < D; d += VL) {
        vf x = vf_load(out_line(m, row, d / MATRIX_DEPTH, (int)(d / VL % 2))) * inverse;
        if (D - d >= VL) vf_store(to + d, x);
        else vf_store_first(to + d, x, D - d);
    }
}
