// Mixture of experts: which experts a token takes, and the weighted sum of what they answer.

// logits (E) -> probabilities, in place of `p`
INLINE void expert_probabilities(int kind, int64_t n, const float *logits, float *p) {
    if (kind == MOE_SIGMOID) {
        for (int64_t e = 0; e < n; e++) p[e] = 1.0f / (1.0f + expf(-logits[e]));
        return;
    }
    float top = logits[0], sum = 0.0f;
    for (int64_t e = 1; e < n; e++) top = logits[e] > top ? logits[e] : top;
    for (int64_t e = 0; e < n; e++) sum += p[e] = expf(logits[e] - top);
    for (int64_t e = 0; e < n; e++) p[e] /= sum;
}

static void op_moe_route(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *logits = view_of(w, s->src[0]), *weights = view_of(w, s->src[1]);
    int64_t used = dst->ne[0], experts = logits->ne[0];
    enum { COST = 16 };                                 // an exponential and `used` comparisons per expert
    float *p = (float *)w->scratch;
    for (row_share r = share_rows(dst->ne[1], experts * COST); next_rows(w, &r);) {
        for (int64_t t = r.first; t < r.end; t++) {
            int32_t *id = (int32_t *)row_at(dst, t, 0, 0);
            float *weight = (float *)row_at(weights, t, 0, 0), sum = 0.0f;
            expert_probabilities(s->i[0], experts, (const float *)row_at(logits, t, 0, 0), p);
            for (int64_t u = 0; u < used; u++) {        // the largest that is left; a tie goes to the lower index
                int64_t best = -1;
                for (int64_t e = 0; e < experts; e++)
                    if (p[e] >= 0.0f && (best < 0 || p[e] > p[best])) best = e;
                if (best < 0) best = 0;                 // only NaN logits leave nothing to choose
                id[u] = (int32_t)best;
                sum += weight[u] = p[best];
                p[best] = -1.0f;
            }
            // the floor is llama.cpp's: the smallest normal half, so that a sum of zeros does not divide
            float factor = s->i[1] ? s->f[0] / fmaxf(sum, 0x1p-14f) : s->f[0];
            for (int64_t u = 0; u < used; u++) weight[u] *= factor;
        }
    }
}
static int64_t scratch_moe_route(const pyg_plan *plan, const pyg_step *s) { return 4 * plan->views[s->src[0]].ne[0]; }

static void op_moe_sum(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *y = view_of(w, s->src[0]), *weights = view_of(w, s->src[1]), *residual = view_of(w, s->src[2]);
    int64_t n = dst->ne[0], used = y->ne[1];
    for (row_share r = share_rows(dst->ne[1], n * used); next_rows(w, &r);) {
        for (int64_t t = r.first; t < r.end; t++) {
            float *to = (float *)row_at(dst, t, 0, 0);
            const float *weight = (const float *)row_at(weights, t, 0, 0);
            const float *start = residual ? (const float *)row_at(residual, t, 0, 0) : NULL;
            #pragma GCC ivdep
            for (int64_t i = 0; i < n; i++) to[i] = start ? start[i] : 0.0f;
            for (int64_t u = 0; u < used; u++) {
                const float *from = (const float *)row_at(y, u, t, 0);
                for (int64_t i = 0; i < n; i++) to[i] += weight[u] * from[i];
            }
        }
    }
}
