// The searches behind encoders that a formula does not define: scales and values of least weighted squared error.
//
// A group of weights shares a scale; a projection maps x / scale onto the values that codes stand for. For given values the best scale is
// a least-squares quotient, for a given scale the best values are the projection: candidates for the scale are ranked, the best polished by
// alternating the two, and then the group scales are rounded to the integers that a block stores, again alternating with the values.
// pyggml/quants/search.py is the readable form. n is 16 or 32 for a group and up to 256 for a block; nothing is allocated.
#pragma once

enum { MAX_BLOCK = 256, MAX_GROUPS = 16 };

typedef struct { float xv, vv, error; } moments;     // sums over a group of w x v, w v v

INLINE moments moments_of(int n, const float *x, const float *w, const float *v) {
    vf xv = {0}, vv = {0};
    for (int i = 0; i < n; i += VL) {
        vf wv = vf_load(w + i) * vf_load(v + i);
        xv = vf_fma(wv, vf_load(x + i), xv);
        vv = vf_fma(wv, vf_load(v + i), vv);
    }
    return (moments){vf_sum(xv), vf_sum(vv), 0};
}
INLINE float error_of(int n, const float *x, const float *w, const float *v, float scale, float shift) {
    vf sum = {0};
    for (int i = 0; i < n; i += VL) {
        vf e = vf_load(x + i) - vf_load(v + i) * scale - shift;
        sum = vf_fma(vf_load(w + i) * e, e, sum);
    }
    return vf_sum(sum);
}
INLINE float half_rounded(float d) { return f16_to_f32(f32_to_f16(d)); }
// The next half float after d: `step` places up, or down where it is negative.
INLINE float half_step(float d, int step) { f16 h = f32_to_f16(d); h.bits += step; return (h.bits & 0x7c00) == 0x7c00 ? d : f16_to_f32(h); }

// ---- projections ---------------------------------------------------------------------------------------------------------------------------
typedef struct projection projection;
typedef void project_fn(const projection *p, int n, const float *x, const float *w, float factor, float *v);
struct projection {
    project_fn *project;         // v = the values nearest to x * factor under the weights w
    project_fn *relaxed;         // the same, roughly and fast: ranks candidates
    float anchors[2];            // what the weight of largest magnitude may be projected on; a single one means the scale is positive
    int   n_anchors;
    float below, above;          // candidates reach from anchor - below to anchor + above
    int   steps;
    const float *levels;         // the possible values (or magnitudes), ascending
    int   n_levels;
    int   span;                  // weights that share what else the projection chooses (even signs, a shift)
};

static void project_integers(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    (void)w;
    vf low = vf_set(p->levels[0]), high = vf_set(p->levels[1]);
    for (int i = 0; i < n; i += VL) vf_store(v + i, vf_min(vf_max(vf_round(vf_load(x + i) * factor), low), high));
}
INLINE vf nearest_level(const projection *p, vf t) {
    vf v = vf_set(p->levels[0]);
    for (int l = 1; l < p->n_levels; l++) v = vf_select(t > 0.5f * (p->levels[l - 1] + p->levels[l]), vf_set(p->levels[l]), v);
    return v;
}
static void project_levels(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    (void)w;
    for (int i = 0; i < n; i += VL) vf_store(v + i, nearest_level(p, vf_load(x + i) * factor));
}
static void project_magnitudes(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    (void)w;
    for (int i = 0; i < n; i += VL) {
        vf t = vf_load(x + i) * factor;
        vi sign = (vi)t & (int32_t)0x80000000;
        vf_store(v + i, (vf)((vi)nearest_level(p, vf_abs(t)) | sign));
    }
}

// ---- one scale ---------------------------------------------------------------------------------------------------------------------------------
// The scale of least error for a group. `direct`: the scale is stored as a half float, so candidates are judged after that rounding.
static float fit_scale(const projection *p, int n, const float *x, const float *w, int direct, int effort) {
    float top = p->n_anchors == 1 ? abs_max(n, x) : signed_max(n, x);
    if (top == 0) return 0;
    float v[MAX_BLOCK], best = 0, best_gain = 0;
    int exact = effort || p->project == p->relaxed;
    int steps = effort ? 2 * p->steps : p->steps;
    for (int a = 0; a < p->n_anchors; a++) {
        for (int i = 0; i <= steps; i++) {
            // from the largest factor down: of equally good scales the smallest leaves other groups of a block the finest steps
            float reach = p->anchors[a] < 0 ? -1 : 1, factor = (p->anchors[a] + reach * (p->above - (p->below + p->above) * i / steps)) / top;
            (exact ? p->project : p->relaxed)(p, n, x, w, factor, v);
            moments m = moments_of(n, x, w, v);
            if (m.vv <= 0) continue;
            float d = m.xv / m.vv, gain = m.xv * d;          // what d * v takes off the error of all zeros
            if (direct) {
                d = half_rounded(d);
                gain = d * (2 * m.xv - d * m.vv);
            }
            if (gain > best_gain * 1.000001f) best_gain = gain, best = d;
        }
    }
    if (!exact) best_gain = 0;                               // a rough gain is no measure for an exact one
    for (int polish = 0; polish < 2; polish++) {
        if (best == 0) break;
        p->project(p, n, x, w, 1 / best, v);
        moments m = moments_of(n, x, w, v);
        if (m.vv <= 0) break;
        float d = direct ? half_rounded(m.xv / m.vv) : m.xv / m.vv, gain = d * (2 * m.xv - d * m.vv);
        if (gain <= best_gain) break;
        best_gain = gain;
        best = d;
    }
    return best;
}
// An error this small beside the energy of the weights comes from rounding the half-float scale: then it pays to try many of them.
enum { MANY_SCALES = 24 };
INLINE int nearly_exact(int n, const float *x, const float *w, float error) {
    static const float zeros[MAX_BLOCK];
    return error < 1e-5f * error_of(n, x, w, zeros, 0, 0);
}

// The same for a half-float scale that is stored as it is; fills in the values.
static float fit_direct(const projection *p, int n, const float *x, const float *w, int effort, float *v) {
    float start = fit_scale(p, n, x, w, 1, effort), d = start, best = INFINITY;
    float u[MAX_BLOCK];
    memset(v, 0, n * sizeof *v);
    for (int step = -1; step <= 1; step++) {                 // the neighbouring half floats may fit better after projection
        float candidate = start == 0 ? 0 : half_step(start, step);
        p->project(p, n, x, w, inverse(candidate), u);
        float error = error_of(n, x, w, u, candidate, 0);
        if (error < best) best = error, d = candidate, memcpy(v, u, n * sizeof *v);
    }
    for (int i = 1; i < MANY_SCALES && start != 0 && nearly_exact(n, x, w, best); i++) {
        float candidate = half_rounded(p->anchors[0] * start / (p->anchors[0] + (p->anchors[0] < 0 ? 0.25f : -0.25f) * i));
        p->project(p, n, x, w, inverse(candidate), u);
        float error = error_of(n, x, w, u, candidate, 0);
        if (error < best) best = error, d = candidate, memcpy(v, u, n * sizeof *v);
    }
    return d;
}

// ---- a block of groups: weight = d * (step * s + offset) * value --------------------------------------------------------------------------
typedef struct { int low, high; float step, offset; } multipliers;       // s from low to high

INLINE int nearest_multiplier(multipliers f, float ratio) {
    float s = nearbyintf((ratio - f.offset) / f.step);
    return !(s > f.low) ? f.low : s > f.high ? f.high : (int)s;     // a NaN, too, gives f.low
}

// Of all the multipliers the one that a rough projection likes best.
static int likely_multiplier(const projection *p, multipliers f, int n, const float *x, const float *w, float d) {
    int found = f.low;
    float v[MAX_BLOCK], least = INFINITY;
    for (int s = f.low; s <= f.high; s++) {
        float scale = d * (f.step * s + f.offset);
        p->relaxed(p, n, x, w, inverse(scale), v);
        float error = error_of(n, x, w, v, scale, 0);
        if (error < least) least = error, found = s;
    }
    return found;
}

// Fills in s (n / group) and the values v (n); returns d, a half float.
static float fit_scaled(const projection *p, multipliers f, int n, int group, const float *x, const float *w, int effort, int8_t *s, float *v) {
    int groups = n / group, cheap = p->project == p->relaxed;
    float start[MAX_GROUPS], top = 0, best_d = 0, best = INFINITY;
    memset(s, 0, groups);
    memset(v, 0, n * sizeof *v);
    for (int g = 0; g < groups; g++) {
        start[g] = fit_scale(p, group, x + g * group, w + g * group, 0, effort);
        if (fabsf(start[g]) > fabsf(top)) top = start[g];
    }
    float low = f.step * f.low + f.offset, high = f.step * f.high + f.offset, extreme = -low > high ? low : high;
    int coarse = f.high - f.low < 100;                       // where steps are fine, the nearest one is as good as any
    int anchors = effort ? (cheap ? 16 : 6) : cheap && coarse ? 3 : 2, rounds = effort ? 8 : 3;
    // the largest scale gets the extreme multiplier, or one of its neighbours
    for (int a = 0; a < anchors || (cheap && a < MANY_SCALES && nearly_exact(n, x, w, best)); a++) {
        float scale[MAX_GROUPS], d = top / (extreme + (extreme > 0 ? -f.step : f.step) * a * 0.5f);
        memcpy(scale, start, sizeof scale);
        float last = INFINITY;
        for (int round = 0; round < rounds; round++) {
            int8_t si[MAX_GROUPS] = {0};
            float u[MAX_BLOCK] = {0}, total = 0, num = 0, den = 0;
            d = half_rounded(d);
            for (int g = 0; g < groups; g++) {
                const float *xg = x + g * group, *wg = w + g * group;
                int middle = nearest_multiplier(f, scale[g] * inverse(d)), reach = effort || cheap ? 1 : 0;
                int likely = cheap ? middle : likely_multiplier(p, f, group, xg, wg, d);
                float least = INFINITY, t[32];
                for (int i = -reach; i <= reach + (likely != middle); i++) {
                    int c = i > reach ? likely : middle + i;
                    if (c < f.low || c > f.high) continue;
                    float factor = f.step * c + f.offset;
                    p->project(p, group, xg, wg, inverse(d * factor), t);
                    float error = error_of(group, xg, wg, t, d * factor, 0);
                    if (error < least) least = error, si[g] = c, memcpy(u + g * group, t, group * sizeof *t);
                }
                moments m = moments_of(group, xg, wg, u + g * group);
                float factor = f.step * si[g] + f.offset;
                num += factor * m.xv;
                den += factor * factor * m.vv;
                total += least;
                if (m.vv > 0) scale[g] = m.xv / m.vv;
            }
            if (total < best) best = total, best_d = d, memcpy(s, si, groups), memcpy(v, u, n * sizeof *v);
            if (total >= last || den <= 0) break;
            last = total;
            d = num / den;
        }
    }
    return best_d;
}

// ---- scale and minimum ---------------------------------------------------------------------------------------------------------------------
typedef struct { double w, x, q, qq, xq; } affine_sums;      // sums of w, w x, w q, w q q, w x q

INLINE affine_sums affine_sums_of(int n, const float *x, const float *w, const float *q) {
    vf sw = {0}, sx = {0}, sq = {0}, sqq = {0}, sxq = {0};
    for (int i = 0; i < n; i += VL) {
        vf wi = vf_load(w + i), xi = vf_load(x + i), qi = vf_load(q + i), wq = wi * qi;
        sw += wi;
        sx = vf_fma(wi, xi, sx);
        sq += wq;
        sqq = vf_fma(wq, qi, sqq);
        sxq = vf_fma(wq, xi, sxq);
    }
    return (affine_sums){vf_sum(sw), vf_sum(sx), vf_sum(sq), vf_sum(sqq), vf_sum(sxq)};
}
INLINE void solve_affine(affine_sums s, int negative, float *scale, float *minimum) {
    double det = s.qq * s.w - s.q * s.q;
    double a = s.qq > 0 ? s.xq / s.qq : 0, m = 0;
    if (det > 1e-6 * s.qq * s.w) {
        double m2 = (s.qq * s.x - s.q * s.xq) / det;
        if (!negative || m2 <= 0) m = m2, a = (s.xq * s.w - s.x * s.q) / det;
    } else if (s.qq == 0) m = s.w > 0 && (!negative || s.x < 0) ? s.x / s.w : 0;
    *scale = a;
    *minimum = m;
}
INLINE void affine_codes(int n, const float *x, float scale, float minimum, float top, float *q) {
    float factor = inverse(scale);
    for (int i = 0; i < n; i += VL) vf_store(q + i, vf_min(vf_max(vf_round((vf_load(x + i) - minimum) * factor), vf_set(0)), vf_set(top)));
}
// Scale and minimum of least error for codes 0..top; `negative`: the minimum is at most 0.
static void fit_affine(int n, const float *x, const float *w, int top, int negative, int effort, float *scale, float *minimum) {
    float low, high, q[32], best = INFINITY;
    range(n, x, &low, &high);
    if (negative && low > 0) low = 0;
    *scale = 0;
    *minimum = low;
    if (high <= low) return;
    int steps = effort ? 60 : 24;
    for (int i = -2; i <= steps; i++) {                      // the last two polish the best
        float s = i < steps - 1 ? (high - low) / (top - 1.0f + 2.6f * (i + 2) / steps) : *scale, m = i < steps - 1 ? low : *minimum;
        affine_codes(n, x, s, m, top, q);
        solve_affine(affine_sums_of(n, x, w, q), negative, &s, &m);
        float error = error_of(n, x, w, q, s, m);
        if (error < best) best = error, *scale = s, *minimum = m;
    }
}
// Half-float scale and minimum stored as they are; fills in the codes.
static void fit_affine_direct(int n, const float *x, const float *w, int top, int effort, float *scale, float *minimum, float *q) {
    float s, m, u[32], best = INFINITY;
    *scale = *minimum = 0;
    memset(q, 0, n * sizeof *q);
    fit_affine(n, x, w, top, 0, effort, &s, &m);
    for (int step = -1; step <= 1; step++) {
        float mh = half_step(m, step), sh = half_rounded(s);
        if (s == 0) sh = half_rounded(x[0] - mh);            // a constant block: the scale takes what the minimum leaves
        for (int round = 0; round < 3; round++) {
            affine_codes(n, x, sh, mh, top, u);
            float error = error_of(n, x, w, u, sh, mh);
            if (error < best) best = error, *scale = sh, *minimum = mh, memcpy(q, u, n * sizeof *q);
            affine_sums a = affine_sums_of(n, x, w, u);
            if (a.qq <= 0) break;
            sh = half_rounded((a.xq - mh * a.q) / a.qq);     // the best scale for the rounded minimum
        }
    }
}

// A block of groups: weight = d * s[g] * q - dmin * m[g], q in 0..top, s and m in 0..most. Fills in s, m, q; d and dmin are half floats.
static void fit_scaled_affine(int n, int group, int top, int most, const float *x, const float *w, int effort,
                              float *out_d, float *out_dmin, uint8_t *s, uint8_t *m, float *q) {
    int groups = n / group;
    float scale0[MAX_GROUPS], min0[MAX_GROUPS], top_s = 0, top_m = 0, best = INFINITY;
    for (int g = 0; g < groups; g++) {
        fit_affine(group, x + g * group, w + g * group, top, 1, effort, &scale0[g], &min0[g]);
        min0[g] = -min0[g];
        top_s = scale0[g] > top_s ? scale0[g] : top_s;
        top_m = min0[g] > top_m ? min0[g] : top_m;
    }
    *out_d = *out_dmin = 0;
    memset(s, 0, groups);
    memset(m, 0, groups);
    memset(q, 0, n * sizeof *q);
    int anchors = effort ? 12 : most > 15 ? 2 : 3, rounds = effort ? 8 : most > 15 ? 2 : 3;
    for (int a = 0; a < anchors || (a < MANY_SCALES && nearly_exact(n, x, w, best)); a++) {
        // the largest scale and minimum get the largest integer, or one below; past the usual candidates the two go separate ways
        float below = a * 0.5f, apart = a < anchors ? below : a * 5 % MANY_SCALES * 0.5f;
        float scale[MAX_GROUPS], minimum[MAX_GROUPS], d = top_s / (most - below), dmin = top_m / (most - apart), last = INFINITY;
        memcpy(scale, scale0, sizeof scale);
        memcpy(minimum, min0, sizeof minimum);
        for (int round = 0; round < rounds; round++) {
            uint8_t si[MAX_GROUPS] = {0}, mi[MAX_GROUPS] = {0};
            float u[MAX_BLOCK] = {0}, total = 0;
            double aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;
            d = half_rounded(d > 0 ? d : 0);
            dmin = half_rounded(dmin > 0 ? dmin : 0);
            for (int g = 0; g < groups; g++) {
                const float *xg = x + g * group, *wg = w + g * group;
                int sc = nearest_multiplier((multipliers){0, most, 1, 0}, scale[g] * inverse(d));
                int mc = nearest_multiplier((multipliers){0, most, 1, 0}, minimum[g] * inverse(dmin));
                float least = INFINITY, t[32];
                for (int ds = -1; ds <= 1; ds++) {
                    for (int dm = -1; dm <= 1; dm++) {
                        int sj = sc + ds, mj = mc + dm;
                        if (sj < 0 || sj > most || mj < 0 || mj > most || (!effort && ds && dm)) continue;
                        affine_codes(group, xg, d * sj, -dmin * mj, top, t);
                        float error = error_of(group, xg, wg, t, d * sj, -dmin * mj);
                        if (error < least) least = error, si[g] = sj, mi[g] = mj, memcpy(u + g * group, t, group * sizeof *t);
                    }
                }
                affine_sums sums = affine_sums_of(group, xg, wg, u + g * group);
                double p = si[g], r = mi[g];
                aa += p * p * sums.qq;
                ab -= p * r * sums.q;
                bb += r * r * sums.w;
                xa += p * sums.xq;
                xb -= r * sums.x;
                total += least;
                solve_affine(sums, 1, &scale[g], &minimum[g]);
                minimum[g] = -minimum[g];
            }
            if (total < best) {
                best = total;
                *out_d = d;
                *out_dmin = dmin;
                memcpy(s, si, groups);
                memcpy(m, mi, groups);
                memcpy(q, u, n * sizeof *q);
            }
            if (total >= last) break;
            last = total;
            double det = aa * bb - ab * ab;
            if (det > 1e-6 * aa * bb) d = (xa * bb - xb * ab) / det, dmin = (xb * aa - xa * ab) / det;
            else if (aa > 0) d = xa / aa;
        }
    }
}
