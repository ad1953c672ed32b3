// RMS norm: y = x / sqrt(mean(x^2) + eps) * weight, and a residual added where there is one

INLINE float rms_scale(const float *x, int64_t n, float eps) {
    enum { ACCS = 4 };
    vf acc[ACCS] = {{0}};
    int64_t i = 0;
    for (; i + ACCS * VL <= n; i += ACCS * VL)
        for (int a = 0; a < ACCS; a++) { vf v = vf_load(x + i + a * VL); acc[a] = vf_fma(v, v, acc[a]); }
    float sum = vf_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

static void op_rms_norm(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *x = view_of(w, s->src[0]), *weight = view_of(w, s->src[1]), *residual = view_of(w, s->src[2]);
    int64_t n = dst->ne[0];
    const float *g = weight ? (const float *)weight->data : NULL;
    for (row_share r = share_rows(row_count(dst), n); next_rows(w, &r);) {
        for (int64_t k = r.first; k < r.end; k++) {
            const float *from = (const float *)nth_row(x, k);
            float *to = (float *)nth_row(dst, k), scale = rms_scale(from, n, s->f[0]);
            #pragma GCC ivdep
            for (int64_t i = 0; i < n; i++) to[i] = from[i] * scale * (g ? g[i] : 1.0f);
            if (!residual) continue;
            const float *add = (const float *)nth_row(residual, k);
            #pragma GCC ivdep
            for (int64_t i = 0; i < n; i++) to[i] += add[i];
        }
    }
}
