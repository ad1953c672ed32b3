// Rotary positions, and rows on their way into the cache.

// table (T, R/2, 2): cos and sin of position * inv_freq. In double: a float angle at position 131072 is off by 0.004 radians.
static void op_rope_table(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *pos = view_of(w, s->src[0]), *inv_freq = view_of(w, s->src[1]);
    int64_t half = dst->ne[1], tokens = dst->ne[2];
    enum { COST = 32 };                                 // a sine and a cosine cost as much as this many floats elsewhere
    for (row_share r = share_rows(tokens, half * COST); next_rows(w, &r);) {
        for (int64_t t = r.first; t < r.end; t++) {
            double position = ((const int32_t *)pos->data)[t];
            float *to = (float *)row_at(dst, 0, t, 0);
            for (int64_t i = 0; i < half; i++) {
                double angle = position * ((const float *)inv_freq->data)[i];
                to[2 * i] = (float)cos(angle) * s->f[0];
                to[2 * i + 1] = (float)sin(angle) * s->f[0];
            }
        }
    }
}

// One head: the first R of D values rotate, the rest pass. x and y may be the same row: each pair is read before it is written.
INLINE void rope_row(int kind, int64_t R, int64_t D, const float *x, const float *table, float *y) {
    int64_t half = R / 2;
    if (kind == ROPE_NORM) {
        #pragma GCC ivdep
        for (int64_t i = 0; i < half; i++) {
            float a = x[2 * i], b = x[2 * i + 1], c = table[2 * i], z = table[2 * i + 1];
            y[2 * i] = a * c - b * z;
            y[2 * i + 1] = b * c + a * z;
        }
    } else {
        #pragma GCC ivdep
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half], c = table[2 * i], z = table[2 * i + 1];
            y[i] = a * c - b * z;
            y[i + half] = b * c + a * z;
        }
    }
    if (y != x && R < D) memcpy(y + R, x + R, (D - R) * sizeof(float));
}

static void op_rope(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *x = view_of(w, s->src[0]), *table = view_of(w, s->src[1]);
    int64_t D = dst->ne[0], heads = dst->ne[1];
    for (row_share r = share_rows(dst->ne[2], heads * D); next_rows(w, &r);)
        for (int64_t t = r.first; t < r.end; t++)
            for (int64_t h = 0; h < heads; h++)
                rope_row(s->i[0], s->i[1], D, (const float *)row_at(x, h, t, 0), (const float *)row_at(table, 0, t, 0), (float *)row_at(dst, h, t, 0));
}

// ---- cache rows ---------------------------------------------------------------------------------------------------------------
INLINE void store_row(int type, int64_t n, const float *x, char *to) {
    int64_t i = 0;
    switch (type) {
    case TYPE_f32: memcpy(to, x, n * sizeof(float)); break;
    case TYPE_f16:
        for (; i + VL <= n; i += VL) vf_to_f16(to + 2 * i, vf_load(x + i));
        for (; i < n; i++) ((f16 *)to)[i] = f32_to_f16(x[i]);
        break;
    case TYPE_bf16:
        for (; i + VL <= n; i += VL) vf_to_bf16(to + 2 * i, vf_load(x + i));
        if (i < n) {
            bf16 last[VL];
            vf_to_bf16(last, vf_load_first(x + i, n - i));
            memcpy(to + 2 * i, last, (n - i) * sizeof(bf16));
        }
        break;
    default: kernels->quantize[type](n, x, to, NULL);
    }
}

static void op_store(worker *w, const pyg_step *s) {
    const pyg_view *cache = view_of(w, s->dst), *x = view_of(w, s->src[0]);
    const int32_t *cell = (const int32_t *)view_of(w, s->src[1])->data;
    int64_t D = x->ne[0], heads = x->ne[1];
    for (row_share r = share_rows(x->ne[2], heads * D); next_rows(w, &r);)
        for (int64_t t = r.first; t < r.end; t++)
            for (int64_t h = 0; h < heads; h++)
                store_row(cache->type, D, (const float *)row_at(x, h, t, 0), row_at(cache, cell[t], h, 0));
}
