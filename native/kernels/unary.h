// Element-wise steps. The result may be written over a source, so loops promise the compiler only what then still holds.

enum { EWISE_ADD, EWISE_MUL };

INLINE void ewise(worker *w, const pyg_step *s, int op) {
    const pyg_view *dst = view_of(w, s->dst), *a = view_of(w, s->src[0]), *b = view_of(w, s->src[1]);
    int64_t n = dst->ne[0];
    int repeats = row_count(b) == 1;                    // one row of b serves every row of a
    for (row_share r = share_rows(row_count(dst), n); next_rows(w, &r);) {
        for (int64_t k = r.first; k < r.end; k++) {
            const float *x = (const float *)nth_row(a, k), *y = (const float *)nth_row(b, repeats ? 0 : k);
            float *to = (float *)nth_row(dst, k);
            #pragma GCC ivdep
            for (int64_t i = 0; i < n; i++) to[i] = op == EWISE_ADD ? x[i] + y[i] : x[i] * y[i];
        }
    }
}
static void op_add(worker *w, const pyg_step *s) { ewise(w, s, EWISE_ADD); }
static void op_mul(worker *w, const pyg_step *s) { ewise(w, s, EWISE_MUL); }

static void op_scale(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *a = view_of(w, s->src[0]);
    int64_t n = dst->ne[0];
    for (row_share r = share_rows(row_count(dst), n); next_rows(w, &r);) {
        for (int64_t k = r.first; k < r.end; k++) {
            const float *x = (const float *)nth_row(a, k);
            float *to = (float *)nth_row(dst, k), factor = s->f[0];
            #pragma GCC ivdep
            for (int64_t i = 0; i < n; i++) to[i] = x[i] * factor;
        }
    }
}

// Soft capping: what is far beyond `cap` comes near it, small numbers stay what they are.
INLINE vf vf_softcap(vf x, float cap) { return cap * vf_tanh(x / cap); }

static void op_softcap(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *a = view_of(w, s->src[0]);
    int64_t n = dst->ne[0];
    for (row_share r = share_rows(row_count(dst), n); next_rows(w, &r);) {
        for (int64_t k = r.first; k < r.end; k++) {
            const float *x = (const float *)nth_row(a, k);
            float *to = (float *)nth_row(dst, k);
            int64_t i = 0;
            for (; i + VL <= n; i += VL) vf_store(to + i, vf_softcap(vf_load(x + i), s->f[0]));
            if (i < n) vf_store_first(to + i, vf_softcap(vf_load_first(x + i, n - i), s->f[0]), n - i);
        }
    }
}

enum { CLAMP = 7 };                                     // of GLU_CLAMPED
// act(gate) * up. GELU is the tanh form, written as x * sigmoid(2u): 0.5 (1 + tanh u) = sigmoid(2u)
INLINE vf vf_glu(int kind, vf gate, vf up) {
    if (kind == GLU_RELU) return vf_max(gate, vf_set(0.0f)) * up;
    if (kind == GLU_SILU) return gate * vf_sigmoid(gate) * up;
    if (kind == GLU_CLAMPED) {
        gate = vf_min(gate, vf_set(CLAMP));
        return gate * vf_sigmoid(1.702f * gate) * (vf_max(vf_min(up, vf_set(CLAMP)), vf_set(-CLAMP)) + 1.0f);
    }
    vf u = 0.79788456080286536f * (gate + 0.044715f * gate * gate * gate);
    return gate * vf_sigmoid(2.0f * u) * up;
}
INLINE void glu_row(int kind, int64_t n, const float *gate, const float *up, float *to) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vf_store(to + i, vf_glu(kind, vf_load(gate + i), vf_load(up + i)));
    if (i < n) vf_store_first(to + i, vf_glu(kind, vf_load_first(gate + i, n - i), vf_load_first(up + i, n - i)), n - i);
}

static void op_glu(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *gate = view_of(w, s->src[0]), *up = view_of(w, s->src[1]);
    for (row_share r = share_rows(row_count(dst), dst->ne[0]); next_rows(w, &r);)
        for (int64_t k = r.first; k < r.end; k++)
            glu_row(s->i[0], dst->ne[0], (const float *)nth_row(gate, k), (const float *)nth_row(up, k), (float *)nth_row(dst, k));
}
