// Rows: how row-wise kernels cut their work into chunks, and get_rows.

enum { CHUNK_FLOATS = 16384 };          // a chunk worth handing out: about 5 microseconds of element-wise work

// The work of a step over `rows` equal rows of `row_floats`; for (each chunk) handles rows .first up to .end.
typedef struct { int64_t rows, step, first, end; } row_share;

INLINE row_share share_rows(int64_t rows, int64_t row_floats) {
    int64_t step = row_floats >= CHUNK_FLOATS ? 1 : CHUNK_FLOATS / (row_floats > 0 ? row_floats : 1);
    return (row_share){rows, step, 0, 0};
}
INLINE int next_rows(worker *w, row_share *r) {
    const int64_t chunks = (r->rows + r->step - 1) / r->step, chunk = claim(w, chunks);
    if (chunk >= chunks) return 0;
    r->first = chunk * r->step;
    r->end = r->first + r->step < r->rows ? r->first + r->step : r->rows;
    return 1;
}

INLINE int64_t row_count(const pyg_view *v) { return v->ne[1] * v->ne[2] * v->ne[3]; }
INLINE char *nth_row(const pyg_view *v, int64_t r) {       // rows counted through all outer dimensions
    int64_t i1 = r % v->ne[1], rest = r / v->ne[1];
    return row_at(v, i1, rest % v->ne[2], rest / v->ne[2]);
}

static void op_get_rows(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *table = view_of(w, s->src[0]), *ids = view_of(w, s->src[1]);
    int64_t n = dst->ne[0];
    float scale = s->f[0];
    for (row_share r = share_rows(dst->ne[1], n); next_rows(w, &r);) {
        for (int64_t t = r.first; t < r.end; t++) {
            float *y = (float *)row_at(dst, t, 0, 0);
            dequantize_row(table->type, n, row_at(table, ((const int32_t *)ids->data)[t], 0, 0), y);
            if (scale != 1.0f)
                for (int64_t i = 0; i < n; i++) y[i] *= scale;
        }
    }
}
