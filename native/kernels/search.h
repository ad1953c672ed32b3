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
    for (int v = -128; v < 128; v++) {
        int c = 0;
        while (c < 16 && table[c] != v) c++;
        if (c < 16) p.value[n++] = v;
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

// ---- one scale -------------------------------------------------------------------------------------------------------------------------------
typedef struct { vf xv, vv; } sums;              // of w x v, w v v
// w may be NULL, for ones.
INLINE sums sums_at(const levels *p, int n, const vf *x, const vf *w, vf factor) {
    sums s = {{0}, {0}};
    for (int i = 0; i < n; i++) {
        vf v = nearest(p, x[i] * factor);
        if (!w) {
            s.xv = vf_fma(x[i], v, s.xv);
            s.vv = vf_fma(v, v, s.vv);
        } else {                                 // products in the order of ggml, so that its ties fall as they do there
            s.xv += p->integers ? w[i] * x[i] * v : w[i] * v * x[i];
            s.vv += w[i] * v * v;
        }
    }
    return s;
}
INLINE vf gain_of(sums s, vf d) { return d * (2.0f * s.xv - d * s.vv); }
INLINE vf signed_top(int n, const vf *x) {       // the value of largest magnitude, of two the first
    vf top = x[0];
    for (int i = 1; i < n; i++) top = vf_select(vf_abs(x[i]) > vf_abs(top), x[i], top);
    return vf_select(vf_abs(top) < 1e-15f, vf_set(0), top);
}

enum { MAX_CANDIDATES = 64 };
typedef struct { int n; float anchor[MAX_CANDIDATES]; } candidates;        // what the largest value may become, in steps of the scale
static void add_candidates(candidates *c, float from, float step, int n) { for (int i = 0; i < n; i++) c->anchor[c->n++] = from + step * i; }

typedef struct { vf scale, factor, gain; } scale_fit;      // factor: what made the codes, the inverse of the scale before its quotient
// half: the scale is stored as a half float, so it is judged after that rounding.
INLINE scale_fit fit_scale(const levels *p, const candidates *c, int half, int n, const vf *x, const vf *w) {
    scale_fit best = {{0}, {0}, {0}};
    vf inverse_top = vf_inverse(signed_top(n, x));
    for (int i = 0; i < c->n; i++) {
        vf factor = c->anchor[i] * inverse_top;
        sums s = sums_at(p, n, x, w, factor);
        vf d = s.xv / s.vv, gain = d * s.xv;
        vi better = (s.xv * s.xv > best.gain * s.vv) & (s.vv > 0);
        if (half) {
            d = vf_half(d);
            gain = gain_of(s, d);
            better = (gain > best.gain) & (s.vv > 0);
        }
        vf_keep(better, &best.gain, gain);
        vf_keep(better, &best.scale, d);
        vf_keep(better, &best.factor, factor);
    }
    return best;
}
// A half-float scale that is stored as it is, polished; its codes are the nearest.
INLINE scale_fit fit_direct(const levels *p, const candidates *c, int n, const vf *x, const vf *w) {
    scale_fit best = fit_scale(p, c, 1, n, x, w);
    vf start = best.scale;
    best.gain = vf_set(0);
    for (int step = 0; step < 4; step++) {
        vf d = step == 3 ? start : vf_half_step(start, step == 0 ? 0 : 2 * step - 3);
        sums s = sums_at(p, n, x, w, vf_inverse(d));
        vf gain = gain_of(s, d);
        vi better = gain > best.gain;
        vf_keep(better, &best.gain, gain);
        vf_keep(better, &best.scale, d);
        if (step == 2) start = vf_half(s.xv * vf_inverse(s.vv));
    }
    best.factor = vf_inverse(best.scale);
    return best;
}

// ---- a block of groups: weight = d * s[group] * value ------------------------------------------------------------------------------------
typedef struct { vf d, dmin, factor, s[MAX_GROUPS], m[MAX_GROUPS]; } fitted;

// A fit that leaves this little of the energy of the weights errs by the rounding of half floats alone: then it pays to try many scales, and
// to sum up errors themselves, for a gain is a difference of sums and knows no more than six digits.
#define NEARLY_EXACT 5e-5f
enum { MANY_SCALES = 24 };
INLINE vf energy_of(int n, const vf *x, const vf *w) {
    vf sum = {0};
    for (int i = 0; i < n; i++) sum += w[i] * x[i] * x[i];
    return sum;
}
INLINE vf error_at(const levels *p, int n, const vf *x, const vf *w, vf d) {
    vf sum = {0}, factor = vf_inverse(d);
    for (int i = 0; i < n; i++) {
        vf e = x[i] - d * nearest(p, x[i] * factor);
        sum += w[i] * e * e;
    }
    return sum;
}

typedef struct { float low, high; int reach, anchors, rounds; } multipliers;       // s from low to high; how far and how often to look
INLINE void fit_scaled(const levels *p, const candidates *c, multipliers f, int groups, int n, const vf *x, const vf *w, fitted *out) {
    vf start[MAX_GROUPS], top = {0}, best = vf_set(-1);
    for (int g = 0; g < groups; g++) {
        start[g] = fit_scale(p, c, 0, n, x + g * n, w + g * n).scale;
        top = vf_select(vf_abs(start[g]) > vf_abs(top), start[g], top);
    }
    vf enough = (1 - NEARLY_EXACT) * energy_of(groups * n, x, w);
    vi wanted = vi_set(-1);
    for (int a = 0; a < MANY_SCALES; a++) {      // the largest scale gets the extreme multiplier, or one of its neighbours
        int exact = a >= f.anchors;
        if (a == f.anchors) {
            if (!vi_any(wanted = (best > enough) & (top != 0))) break;
            best = vf_set(0);
            for (int g = 0; g < groups; g++) best -= error_at(p, n, x + g * n, w + g * n, out->d * out->s[g]);
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
                    sums at = sums_at(p, n, x + g * n, w + g * n, vf_inverse(dk));
                    vf gain = exact ? -error_at(p, n, x + g * n, w + g * n, dk) : gain_of(at, dk);
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
INLINE affine_sums affine_sums_at(int n, const vf *x, const vf *w, vf minimum, vf factor, float top) {
    affine_sums s = {{0}, {0}, {0}};
    for (int i = 0; i < n; i++) {
        vf q = affine_code(x[i], minimum, factor, top), wq = w[i] * q;
        s.q += wq;
        s.qq += wq * q;
        s.xq += wq * x[i];
    }
    return s;
}
// What scale a and minimum m take off the error of all zeros; w, x: sums of w, w x.
INLINE vf affine_gain(affine_sums s, vf w, vf x, vf a, vf m) {
    return a * (2.0f * s.xq - a * s.qq - 2.0f * m * s.q) + m * (2.0f * x - m * w);
}
typedef struct { vf scale, minimum, factor, base, gain; } affine_fit;      // codes are those of (x - base) * factor
typedef struct { float from, step; int n, polish; } affine_candidates;     // steps that the range of the weights may have
typedef enum { BY_GAIN, BY_SQUARES, BY_MAGNITUDES } measure;               // the least of what: errors from the sums, or summed up: w e e, w |e|
// Scale and minimum for codes 0..top; `negative`: the minimum is at most 0.
// The range reaches from the best minimum so far to the largest weight.
INLINE affine_fit fit_affine(float top, int negative, measure by, affine_candidates c, int n, const vf *x, const vf *w) {
    vf low = x[0], high = low, sw = w[0], sx = w[0] * x[0];
    for (int i = 1; i < n; i++) {
        low = vf_min(low, x[i]);
        high = vf_max(high, x[i]);
        sw += w[i];
        sx += w[i] * x[i];
    }
    if (negative) low = vf_min(low, vf_set(0));
    vi some = high > low;
    affine_fit best = {(vf)((vi)(1.0f / (top / (high - low))) & some), low, {0}, low, vf_set(-INFINITY)};
    for (int i = -1; i < c.n + c.polish; i++) {  // first the range itself, as it is
        vf a = best.scale, m = best.minimum, base = m, factor = i < c.n ? (i < 0 ? top : c.from + c.step * i) / (high - base) : 1.0f / a;
        factor = (vf)((vi)factor & some);
        affine_sums s = affine_sums_at(n, x, w, base, factor, top);
        vi solved = some;
        if (i >= 0) {
            vf det = sw * s.qq - s.q * s.q;
            solved &= det > 0;
            a = (sw * s.xq - sx * s.q) / det;
            m = (s.qq * sx - s.q * s.xq) / det;
            if (negative) {
                vi above = m > 0;
                vf_keep(above, &m, vf_set(0));
                vf_keep(above, &a, s.xq / s.qq);
            }
        }
        vf gain = {0};
        if (by == BY_GAIN) gain = affine_gain(s, sw, sx, a, m);
        else for (int j = 0; j < n; j++) {
            vf e = a * affine_code(x[j], base, factor, top) + m - x[j];
            gain -= w[j] * (by == BY_SQUARES ? e * e : vf_abs(e));
        }
        vi better = (gain > best.gain) & solved;
        vf_keep(better, &best.gain, gain);
        vf_keep(better, &best.scale, a);
        vf_keep(better, &best.minimum, m);
        vf_keep(better, &best.factor, factor);
        vf_keep(better, &best.base, base);
    }
    return best;
}
// Half-float scale and minimum stored as they are; their codes are the nearest.
INLINE affine_fit fit_affine_direct(float top, affine_candidates c, int n, const vf *x, const vf *w) {
    affine_fit start = fit_affine(top, 0, BY_GAIN, c, n, x, w), best = {{0}, {0}, {0}, {0}, vf_set(-INFINITY)};
    vf sw = {0}, sx = {0};
    for (int i = 0; i < n; i++) sw += w[i], sx += w[i] * x[i];
    for (int step = -1; step <= 1; step++) {
        vf m = step ? vf_half_step(start.minimum, step) : vf_half(start.minimum), a = vf_half(start.scale);
        a = vf_select(start.scale != 0, a, vf_half(x[0] - m));      // a constant block: the scale takes what the minimum leaves
        for (int round = 0; round < 2; round++) {
            affine_sums s = affine_sums_at(n, x, w, m, vf_inverse(a), top);
            vf gain = affine_gain(s, sw, sx, a, m);
            vi better = gain > best.gain;
            vf_keep(better, &best.gain, gain);
            vf_keep(better, &best.scale, a);
            vf_keep(better, &best.minimum, m);
            a = vf_half((s.xq - m * s.q) * vf_inverse(s.qq));       // the best scale for the rounded minimum
        }
    }
    best.base = best.minimum;
    best.factor = vf_inverse(best.scale);
    return best;
}
INLINE vf affine_error_at(int n, const vf *x, const vf *w, vf scale, vf minimum, float top) {
    vf sum = {0}, factor = vf_inverse(scale);
    for (int i = 0; i < n; i++) {
        vf e = x[i] - minimum - scale * affine_code(x[i], minimum, factor, top);
        sum += w[i] * e * e;
    }
    return sum;
}
// A block of groups: weight = d * s[g] * q - dmin * m[g], q in 0..top, s and m in 0..most.
INLINE void fit_scaled_affine(float top, float most, affine_candidates c, int anchors, int rounds, int groups, int n, const vf *x, const vf *w,
                              fitted *out) {
    vf scale0[MAX_GROUPS], min0[MAX_GROUPS], sw[MAX_GROUPS], sx[MAX_GROUPS], top_s = {0}, top_m = {0}, best = vf_set(-INFINITY);
    for (int g = 0; g < groups; g++) {
        affine_fit a = fit_affine(top, 1, BY_GAIN, c, n, x + g * n, w + g * n);
        scale0[g] = a.scale;
        min0[g] = -a.minimum;
        top_s = vf_max(top_s, scale0[g]);
        top_m = vf_max(top_m, min0[g]);
        sw[g] = sx[g] = vf_set(0);
        for (int i = g * n; i < (g + 1) * n; i++) sw[g] += w[i], sx[g] += w[i] * x[i];
    }
    vf enough = (1 - NEARLY_EXACT) * energy_of(groups * n, x, w);
    vi wanted = vi_set(-1);
    for (int a = 0; a < MANY_SCALES; a++) {      // the largest scale and minimum get the largest integer, or one below; later the two go separate ways
        int exact = a >= anchors;
        if (a == anchors) {
            if (!vi_any(wanted = (best > enough) & (top_s > 0))) break;
            best = vf_set(0);
            for (int g = 0; g < groups; g++) best -= affine_error_at(n, x + g * n, w + g * n, out->d * out->s[g], -out->dmin * out->m[g], top);
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
                        affine_sums at = affine_sums_at(n, x + g * n, w + g * n, base, vf_inverse(dj), top);
                        vf gain = exact ? -affine_error_at(n, x + g * n, w + g * n, dj, base, top) : affine_gain(at, sw[g], sx[g], dj, base);
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
