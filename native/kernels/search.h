// The searches behind encoders: scales, minimums and integer multipliers of least weighted squared error.
//
// VL blocks are searched side by side: lane l of every vector belongs to block l, so nothing is ever summed across lanes, and what a block
// becomes does not depend on its neighbours. For given codes the best scale is a least-squares quotient, for a given scale the best codes
// are the nearest: candidates for the scale are tried, each followed by its quotient, the best polished by alternating the two, and then
// group scales are rounded to the integers that a block stores, again alternating. pyggml/quants/search.py is the readable form.
// Errors are compared as gains: what a fit takes off the error of all zeros, a sum that comes out of the same pass as the quotient.
#pragma once

enum { MAX_BLOCK = 256, MAX_GROUPS = 16 };

INLINE vf vf_half(vf d) { f16 h[VL]; vf_to_f16(h, d); return vf_from_f16(h); }
INLINE vf vf_half_step(vf d, int step) { return vf_half(d * (1 + 0.6f * 0x1p-10f * step)); }       // the next half float, further from 0 or nearer
INLINE vf vf_clamp(vf v, float low, float high) { return vf_min(vf_max(v, vf_set(low)), vf_set(high)); }
INLINE int vi_any(vi mask) { return vf_hmax((vf)(mask & 0x3f800000)) > 0; }
INLINE void vf_keep(vi better, vf *best, vf v) { *best = vf_select(better, v, *best); }

// ---- the values that codes stand for -----------------------------------------------------------------------------------------------------
typedef struct { int integers; float low, high, value[16], middle[16]; } levels;       // value: ascending; middle[i]: between value i - 1 and i

#define INTEGERS(first, last) {.integers = 1, .low = first, .high = last}
// Of a table of 16 values in any order; values that occur twice fill up at the end.
static levels levels_of(const int8_t *table) {
    levels p = {0};
    int n = 0;
    for (int c = 0; c < 16; c++) {
        int at = n;
        while (at && p.value[at - 1] > table[c]) at--;
        if (at && p.value[at - 1] == table[c]) continue;
        memmove(p.value + at + 1, p.value + at, (n++ - at) * sizeof *p.value);
        p.value[at] = table[c];
    }
    for (p.low = p.value[0], p.high = p.value[n - 1]; n < 16; n++) p.value[n] = p.high;
    for (int i = 1; i < 16; i++) p.middle[i] = 0.5f * (p.value[i - 1] + p.value[i]);
    return p;
}
INLINE vi nearest_place(const levels *p, vf t) {       // by halves
    vi at = {0};
    UNROLL(4) for (int bit = 8; bit > 0; bit >>= 1) at |= (t > vf_lookup16(p->middle, at | bit)) & bit;
    return at;
}
INLINE vf nearest(const levels *p, vf t) {
    return p->integers ? vf_clamp(vf_round(t), p->low, p->high) : vf_lookup16(p->value, nearest_place(p, t));
}
// The whole number nearest to x * factor: added, 1.5 * 2^23 leaves no room for fractions. What is too large for that is clamped.
#define WHOLE 12582912.0f
INLINE vf whole_at(vf x, vf factor, float low, float high) {
    return vf_clamp(vf_fma(x, factor, vf_set(WHOLE)), WHOLE + low, WHOLE + high) - WHOLE;
}
INLINE vf value_at(const levels *p, vf x, vf factor) {
    return p->integers ? whole_at(x, factor, p->low, p->high) : nearest(p, x * factor);
}

// ---- weights in groups -----------------------------------------------------------------------------------------------------------------------
// What a search works on: weights, what their errors count, the products of the two. w NULL: all count one, and wx is x.
typedef struct { const vf *x, *w, *wx; } weights;
INLINE weights weights_of(int n, const vf *x, const vf *w, vf *products) {
    for (int i = 0; w && i < n; i++) products[i] = w[i] * x[i];
    return (weights){x, w, w ? products : x};
}
INLINE weights part(weights t, int at) { return (weights){t.x + at, t.w ? t.w + at : NULL, t.wx + at}; }
INLINE vf weighted(weights t, int i, vf v) { return t.w ? t.w[i] * v : v; }
INLINE vf energy_of(int n, weights t) {
    vf sum[2] = {{0}, {0}};                      // of every other weight, so that no sum waits for itself
    for (int i = 0; i < n; i += 2) UNROLL(2) for (int k = 0; k < 2; k++) sum[k] = vf_fma(t.wx[i + k], t.x[i + k], sum[k]);
    return sum[0] + sum[1];
}

// ---- one scale -------------------------------------------------------------------------------------------------------------------------------
typedef struct { vf xv, vv; } sums;              // of w x v, w v v
// For `count` factors at once, so that no sum waits for itself. wx NULL: products in the order of ggml, so that its ties fall as they do there.
INLINE void sums_of(const levels *p, int n, weights t, int count, const vf *factor, sums *s) {
    for (int k = 0; k < count; k++) s[k] = (sums){{0}, {0}};
    for (int i = 0; i < n; i++) {
        UNROLL(4) for (int k = 0; k < count; k++) {
            if (t.wx) {
                vf v = value_at(p, t.x[i], factor[k]);
                s[k].xv = vf_fma(t.wx[i], v, s[k].xv);
                s[k].vv = vf_fma(weighted(t, i, v), v, s[k].vv);
            } else {
                vf v = nearest(p, t.x[i] * factor[k]);
                s[k].xv += p->integers ? t.w[i] * t.x[i] * v : t.w[i] * v * t.x[i];
                s[k].vv += t.w[i] * v * v;
            }
        }
    }
}
INLINE sums sums_at(const levels *p, int n, weights t, vf factor) {
    sums s;
    sums_of(p, n, t, 1, &factor, &s);
    return s;
}
INLINE vf gain_of(sums s, vf d) { return d * (2.0f * s.xv - d * s.vv); }
INLINE void range_of(int n, const vf *x, vf *low, vf *high) {
    vf down[2] = {x[0], x[1]}, up[2] = {x[0], x[1]};
    for (int i = 2; i < n; i += 2) UNROLL(2) for (int k = 0; k < 2; k++) {
        down[k] = vf_min(down[k], x[i + k]);
        up[k] = vf_max(up[k], x[i + k]);
    }
    *low = vf_min(down[0], down[1]);
    *high = vf_max(up[0], up[1]);
}
INLINE vf signed_top(int n, const vf *x) {       // the value of largest magnitude, of two the first
    vf low, high;
    range_of(n, x, &low, &high);
    vf top = vf_select(high > -low, high, low);
    vi twice = (high == -low) & (high != 0);
    if (vi_any(twice)) for (int i = n - 1; i >= 0; i--) vf_keep(twice & (vf_abs(x[i]) == high), &top, x[i]);
    return vf_select(vf_abs(top) < 1e-15f, vf_set(0), top);
}

enum { MAX_CANDIDATES = 64 };
typedef struct { int n; float anchor[MAX_CANDIDATES]; } candidates;        // what the largest value may become, in steps of the scale
static void add_candidates(candidates *c, float from, float step, int n) { for (int i = 0; i < n; i++) c->anchor[c->n++] = from + step * i; }

typedef struct { vf scale, factor, gain; } scale_fit;      // factor: what made the codes, the inverse of the scale before its quotient
enum { TOGETHER = 4 };                           // candidates whose sums are made in one pass over the weights
// half: the scale is stored as a half float, so it is judged after that rounding.
INLINE scale_fit fit_scale(const levels *p, const candidates *c, int half, int n, weights t) {
    scale_fit best = {{0}, {0}, {0}};
    vf inverse_top = vf_inverse(signed_top(n, t.x));
    for (int i = 0; i < c->n; i += TOGETHER) {
        vf factor[TOGETHER];
        sums all[TOGETHER];
        for (int k = 0; k < TOGETHER; k++) factor[k] = c->anchor[i + k < c->n ? i + k : i] * inverse_top;
        sums_of(p, n, t, TOGETHER, factor, all);
        UNROLL(4) for (int k = 0; k < TOGETHER; k++) {
            sums s = all[k];
            vf d = s.xv / s.vv, gain = d * s.xv;
            vi better = (s.xv * s.xv > best.gain * s.vv) & (s.vv > 0);
            if (half) {
                d = vf_half(d);
                gain = gain_of(s, d);
                better = (gain > best.gain) & (s.vv > 0);
            }
            vf_keep(better, &best.gain, gain);
            vf_keep(better, &best.scale, d);
            vf_keep(better, &best.factor, factor[k]);
        }
    }
    return best;
}
// A fit that leaves this little of the energy of the weights errs by the rounding of half floats alone: then it pays to try many scales, and
// to sum up errors themselves, for a gain is a difference of sums and knows no more than six digits.
#define NEARLY_EXACT 5e-5f
enum { MANY_SCALES = 24 };
#define EXACT 2e-4f             // and for a single scale the half floats beside it
INLINE vf error_at(const levels *p, int n, weights t, vf d) {
    vf sum = {0}, factor = vf_inverse(d);
    for (int i = 0; i < n; i++) {
        vf e = t.x[i] - d * value_at(p, t.x[i], factor);
        sum = vf_fma(weighted(t, i, e), e, sum);
    }
    return sum;
}
// A half-float scale that is stored as it is; its codes are the nearest. It is polished `polish` times, and where it is nearly exact once
// more, with its neighbours.
INLINE scale_fit fit_direct(const levels *p, const candidates *c, int polish, int n, weights t) {
    scale_fit best = fit_scale(p, c, 1, n, t);
    vf start = best.scale, enough = (1 - EXACT) * energy_of(n, t), polished = start;
    vi wanted = vi_set(-1);
    for (int step = -polish; step < 4; step++) {
        if (step == 0 && !vi_any(wanted = best.gain > enough)) break;
        vf d = step == 1 || step == 2 ? vf_half_step(start, 2 * step - 3) : polished;
        sums s = sums_at(p, n, t, vf_inverse(d));
        vf gain = gain_of(s, d);
        vi better = (gain > best.gain) & wanted;
        vf_keep(better, &best.gain, gain);
        vf_keep(better, &best.scale, d);
        polished = vf_half(s.xv * vf_inverse(s.vv));
    }
    best.factor = vf_inverse(best.scale);
    return best;
}

// ---- a block of groups: weight = d * s[group] * value ------------------------------------------------------------------------------------
// d, dmin: codes are the nearest for these; what is stored may be longer.
typedef struct { vf d, dmin, stored, stored_min, factor, s[MAX_GROUPS], m[MAX_GROUPS]; } fitted;

typedef struct { float low, high; int reach, anchors, rounds; } multipliers;       // s from low to high; how far and how often to look
INLINE void fit_scaled(const levels *p, const candidates *c, multipliers f, int groups, int n, const vf *x, const vf *w, fitted *out) {
    vf start[MAX_GROUPS], top = {0}, best = vf_set(-1), products[MAX_BLOCK];
    *out = (fitted){0};                          // what remains of a block that no candidate fits, as its sums overflow
    weights t = weights_of(groups * n, x, w, products);
    for (int g = 0; g < groups; g++) {
        start[g] = fit_scale(p, c, 0, n, part(t, g * n)).scale;
        top = vf_select(vf_abs(start[g]) > vf_abs(top), start[g], top);
    }
    vf enough = (1 - NEARLY_EXACT) * energy_of(groups * n, t);
    vi wanted = vi_set(-1);
    for (int a = 0; a < MANY_SCALES; a++) {      // the largest scale gets the extreme multiplier, or one of its neighbours
        int exact = a >= f.anchors;
        if (a == f.anchors) {
            if (!vi_any(wanted = (best > enough) & (top != 0))) break;
            best = vf_set(0);
            for (int g = 0; g < groups; g++) best -= error_at(p, n, part(t, g * n), out->d * out->s[g]);
        }
        vf d = top * (1 / (f.low + 0.5f * a)), scale[MAX_GROUPS];
        memcpy(scale, start, sizeof scale);
        for (int round = 0; round < f.rounds; round++) {
            vf s[MAX_GROUPS], total = {0}, num = {0}, den = {0};
            d = vf_half(d);
            vf inverse_d = vf_inverse(d);
            for (int g = 0; g < groups; g++) {
                vf middle = vf_round(scale[g] * inverse_d), most = vf_set(-INFINITY);
                sums sum = {{0}, {0}};
                for (int i = -f.reach; i <= f.reach; i++) {
                    vf k = vf_clamp(middle + (float)i, f.low, f.high), dk = d * k;
                    sums at = sums_at(p, n, part(t, g * n), vf_inverse(dk));
                    vf gain = exact ? -error_at(p, n, part(t, g * n), dk) : gain_of(at, dk);
                    vi better = gain > most;
                    vf_keep(better, &most, gain);
                    vf_keep(better, &s[g], k);
                    vf_keep(better, &sum.xv, at.xv);
                    vf_keep(better, &sum.vv, at.vv);
                }
                num += s[g] * sum.xv;
                den += s[g] * s[g] * sum.vv;
                total += most;
                scale[g] = sum.xv * vf_inverse(sum.vv);
            }
            vi better = (total > best) & wanted;
            vf_keep(better, &best, total);
            vf_keep(better, &out->d, d);
            for (int g = 0; g < groups; g++) vf_keep(better, &out->s[g], s[g]);
            d = vf_select(den > 0, num / den, d);
        }
    }
}

// ---- scale and minimum ---------------------------------------------------------------------------------------------------------------------
typedef struct { vf q, qq, xq; } affine_sums;    // of w q, w q q, w x q
INLINE vf affine_code(vf x, vf minimum, vf factor, float top) { return vf_clamp(vf_round((x - minimum) * factor), 0, top); }
// For `count` factors at once, so that no sum waits for itself.
INLINE void affine_sums_of(int n, weights t, vf minimum, int count, const vf *factor, float top, affine_sums *s) {
    for (int k = 0; k < count; k++) s[k] = (affine_sums){{0}, {0}, {0}};
    for (int i = 0; i < n; i++) {
        vf x = t.x[i] - minimum;
        UNROLL(4) for (int k = 0; k < count; k++) {
            vf q = whole_at(x, factor[k], 0, top), wq = weighted(t, i, q);
            s[k].q += wq;
            s[k].qq = vf_fma(wq, q, s[k].qq);
            s[k].xq = vf_fma(t.wx[i], q, s[k].xq);
        }
    }
}
INLINE affine_sums affine_sums_at(int n, weights t, vf minimum, vf factor, float top) {
    affine_sums s;
    affine_sums_of(n, t, minimum, 1, &factor, top, &s);
    return s;
}
// What scale a and minimum m take off the error of all zeros; w, x: sums of w, w x.
INLINE vf affine_gain(affine_sums s, vf w, vf x, vf a, vf m) {
    return a * (2.0f * s.xq - a * s.qq - 2.0f * m * s.q) + m * (2.0f * x - m * w);
}
INLINE void totals(int n, weights t, vf *w, vf *x) {
    vf sum[2] = {{0}, {0}};
    for (int i = 0; i < n; i += 2) UNROLL(2) for (int k = 0; k < 2; k++) sum[k] += t.wx[i + k];
    *x = sum[0] + sum[1];
    *w = vf_set(t.w ? 0 : n);
    for (int i = 0; t.w && i < n; i++) *w += t.w[i];
}
typedef struct { vf scale, minimum, factor, base, gain; } affine_fit;      // codes are those of (x - base) * factor
typedef struct { float from, step; int n, polish; } affine_candidates;     // steps that the range of the weights may have
// The scale and minimum of least error for the codes of these sums.
INLINE void solve_affine(affine_sums s, int negative, vf sw, vf sx, affine_fit *best) {
    vf det = sw * s.qq - s.q * s.q, inverse_det = 1.0f / det;
    vf a = (sw * s.xq - sx * s.q) * inverse_det, m = (s.qq * sx - s.q * s.xq) * inverse_det;
    if (negative) {
        vi over = m > 0;
        vf_keep(over, &m, vf_set(0));
        vf_keep(over, &a, s.xq * vf_inverse(s.qq));
    }
    vf gain = affine_gain(s, sw, sx, a, m);
    vi better = (gain > best->gain) & (det > 0);
    vf_keep(better, &best->gain, gain);
    vf_keep(better, &best->scale, a);
    vf_keep(better, &best->minimum, m);
}
// Scale and minimum for codes 0..top; `negative`: the minimum is at most 0. The range itself comes first; then ranges reach from the best
// minimum so far to the largest weight, TOGETHER at a time; the best one is polished.
INLINE affine_fit fit_affine(float top, int negative, affine_candidates c, int n, weights t, vf sw, vf sx) {
    vf low, high;
    range_of(n, t.x, &low, &high);
    if (negative) low = vf_min(low, vf_set(0));
    affine_fit best = {.scale = (high - low) * (1 / top), .minimum = low, .gain = vf_set(-INFINITY)};
    solve_affine(affine_sums_at(n, t, low, top * vf_inverse(high - low), top), negative, sw, sx, &best);
    for (int i = 0; i < c.n; i += TOGETHER) {
        vf inverse_range = vf_inverse(high - best.minimum), factor[TOGETHER];
        affine_sums s[TOGETHER];
        for (int k = 0; k < TOGETHER; k++) factor[k] = (c.from + c.step * (i + k)) * inverse_range;
        affine_sums_of(n, t, best.minimum, TOGETHER, factor, top, s);
        UNROLL(4) for (int k = 0; k < TOGETHER; k++) solve_affine(s[k], negative, sw, sx, &best);
    }
    for (int i = 0; i < c.polish; i++) solve_affine(affine_sums_at(n, t, best.minimum, vf_inverse(best.scale), top), negative, sw, sx, &best);
    return best;
}
// Half-float scale and minimum stored as they are; their codes are the nearest.
INLINE affine_fit fit_affine_direct(float top, affine_candidates c, int n, weights t) {
    vf sw, sx;
    totals(n, t, &sw, &sx);
    affine_fit start = fit_affine(top, 0, c, n, t, sw, sx), best = {.gain = vf_set(-INFINITY)};
    vf enough = (1 - EXACT) * energy_of(n, t);
    vi wanted = vi_set(-1);
    for (int step = 0; step < 3; step++) {
        if (step == 1 && !vi_any(wanted = best.gain > enough)) break;
        vf m = step ? vf_half_step(start.minimum, 2 * step - 3) : vf_half(start.minimum), a = vf_half(start.scale);
        a = vf_select(start.scale != 0, a, vf_half(t.x[0] - m));    // a constant block: the scale takes what the minimum leaves
        for (int round = 0; round < 2; round++) {
            affine_sums s = affine_sums_at(n, t, m, vf_inverse(a), top);
            vf gain = affine_gain(s, sw, sx, a, m);
            vi better = (gain > best.gain) & wanted;
            vf_keep(better, &best.gain, gain);
            vf_keep(better, &best.scale, a);
            vf_keep(better, &best.minimum, m);
            vf det = sw * s.qq - s.q * s.q;
            if (!step) vf_keep(det > 0, &m, vf_half((s.qq * sx - s.q * s.xq) / det));
            a = vf_half((s.xq - m * s.q) * vf_inverse(s.qq));       // the best scale for the rounded minimum
        }
    }
    best.base = best.minimum;
    best.factor = vf_inverse(best.scale);
    return best;
}
INLINE vf affine_error_at(int n, weights t, vf scale, vf minimum, float top) {
    vf sum = {0}, factor = vf_inverse(scale);
    for (int i = 0; i < n; i++) {
        vf e = t.x[i] - minimum - scale * affine_code(t.x[i], minimum, factor, top);
        sum = vf_fma(weighted(t, i, e), e, sum);
    }
    return sum;
}
// A block of groups: weight = d * s[g] * q - dmin * m[g], q in 0..top, s and m in 0..most.
INLINE void fit_scaled_affine(float top, float most, affine_candidates c, int anchors, int rounds, int groups, int n, const vf *x, const vf *w,
                              fitted *out) {
    vf scale0[MAX_GROUPS], min0[MAX_GROUPS], sw[MAX_GROUPS], sx[MAX_GROUPS], top_s = {0}, top_m = {0}, best = vf_set(-INFINITY),
       products[MAX_BLOCK];
    *out = (fitted){0};
    weights t = weights_of(groups * n, x, w, products);
    for (int g = 0; g < groups; g++) {
        totals(n, part(t, g * n), &sw[g], &sx[g]);
        affine_fit a = fit_affine(top, 1, c, n, part(t, g * n), sw[g], sx[g]);
        scale0[g] = a.scale;
        min0[g] = -a.minimum;
        top_s = vf_max(top_s, scale0[g]);
        top_m = vf_max(top_m, min0[g]);
    }
    vf enough = (1 - NEARLY_EXACT) * energy_of(groups * n, t);
    vi wanted = vi_set(-1);
    for (int a = 0; a < MANY_SCALES; a++) {      // the largest scale and minimum get the largest integer, or one below; later the two go separate ways
        int exact = a >= anchors;
        if (a == anchors) {
            if (!vi_any(wanted = (best > enough) & (top_s > 0))) break;
            best = vf_set(0);
            for (int g = 0; g < groups; g++) best -= affine_error_at(n, part(t, g * n), out->d * out->s[g], -out->dmin * out->m[g], top);
        }
        vf scale[MAX_GROUPS], minimum[MAX_GROUPS], d = top_s / (most - 0.5f * a), dmin = top_m / (most - 0.5f * (a < anchors ? a : a * 5 % MANY_SCALES));
        memcpy(scale, scale0, sizeof scale);
        memcpy(minimum, min0, sizeof minimum);
        for (int round = 0; round < rounds; round++) {
            vf s[MAX_GROUPS], m[MAX_GROUPS], total = {0}, aa = {0}, ab = {0}, bb = {0}, xa = {0}, xb = {0};
            d = vf_half(vf_max(d, vf_set(0)));
            dmin = vf_half(vf_max(dmin, vf_set(0)));
            vf inverse_d = vf_inverse(d), inverse_dmin = vf_inverse(dmin);
            for (int g = 0; g < groups; g++) {
                vf sc = vf_round(scale[g] * inverse_d), mc = vf_round(minimum[g] * inverse_dmin), most_gain = vf_set(-INFINITY);
                affine_sums sum = {{0}, {0}, {0}};
                for (int ds = -1; ds <= 1; ds++) {
                    for (int dm = -1; dm <= 1; dm++) {
                        vf sj = vf_clamp(sc + (float)ds, 0, most), mj = vf_clamp(mc + (float)dm, 0, most), dj = d * sj, base = -dmin * mj;
                        affine_sums at = affine_sums_at(n, part(t, g * n), base, vf_inverse(dj), top);
                        vf gain = exact ? -affine_error_at(n, part(t, g * n), dj, base, top) : affine_gain(at, sw[g], sx[g], dj, base);
                        vi better = gain > most_gain;
                        vf_keep(better, &most_gain, gain);
                        vf_keep(better, &s[g], sj);
                        vf_keep(better, &m[g], mj);
                        vf_keep(better, &sum.q, at.q);
                        vf_keep(better, &sum.qq, at.qq);
                        vf_keep(better, &sum.xq, at.xq);
                    }
                }
                total += most_gain;
                aa += s[g] * s[g] * sum.qq;
                ab -= s[g] * m[g] * sum.q;
                bb += m[g] * m[g] * sw[g];
                xa += s[g] * sum.xq;
                xb -= m[g] * sx[g];
                vf det = sw[g] * sum.qq - sum.q * sum.q, at = (sw[g] * sum.xq - sx[g] * sum.q) / det, mt = (sum.q * sum.xq - sum.qq * sx[g]) / det;
                vi usable = (det > 1e-6f * sw[g] * sum.qq) & (mt >= 0);
                vf_keep(usable, &scale[g], at);
                vf_keep(usable, &minimum[g], mt);
            }
            vi better = (total > best) & wanted;
            vf_keep(better, &best, total);
            vf_keep(better, &out->d, d);
            vf_keep(better, &out->dmin, dmin);
            for (int g = 0; g < groups; g++) {
                vf_keep(better, &out->s[g], s[g]);
                vf_keep(better, &out->m[g], m[g]);
            }
            vf det = aa * bb - ab * ab;
            vi usable = det > 1e-6f * aa * bb;
            d = vf_select(usable, (xa * bb - xb * ab) / det, vf_select(aa > 0, xa / aa, d));
            dmin = vf_select(usable, (xb * aa - xa * ab) / det, dmin);
        }
    }
}
