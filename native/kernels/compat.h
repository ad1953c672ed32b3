// ggml's own choices of scales: the same candidates, weights and orders of summation, so that files have the error llama-quantize's have.
// Blocks stand side by side as in search.h, which also does the fits; here is what ggml does otherwise.
#pragma once

INLINE weights as_ggml(const vf *x, const vf *w) { return (weights){x, w, NULL}; }        // sums in its order
INLINE void group_weights(int groups, int n, const vf *w, vf *sw) {
    for (int g = 0; g < groups; g++) {
        sw[g] = w[g * n];
        for (int i = 1; i < n; i++) sw[g] += w[g * n + i];
    }
}

// The top may become -n, or up to nine tenths of a step less or more.
static candidates tenths_around(int n) {
    candidates c = {0};
    add_candidates(&c, -n, 0, 1);
    add_candidates(&c, -n + 0.9f, -0.1f, 19);
    return c;
}

INLINE vf in_a_byte(vf l) { return l + vf_select(l < 0, vf_set(256), vf_set(0)); }      // where ggml keeps codes: a negative one grows
// Integers s for x >= 0 (n values; where few are negative, as in ggml), and their scale: the best of nine scales, then single integers are
// moved while that helps.
INLINE vf positive_multipliers(int n, float most, const vf *x, const vf *w, vf *s) {
    vf top = {0}, least = {0}, factor = {0}, lx = {0}, ll = {0};
    for (int i = 0; i < n; i++) top = vf_max(top, x[i]);
    vi some = top >= 1e-15f;
    vf inverse_top = (vf)((vi)(1.0f / top) & some);
    for (int k = 0; k < 9; k++) {
        int tenth = k == 0 ? 0 : k <= 4 ? k - 5 : k - 4;
        vf f = (most + 0.1f * tenth) * inverse_top, scale = vf_inverse(f), error = {0};
        for (int i = 0; i < n; i++) {
            vf l = vf_round(f * x[i]), e = x[i] - scale * (k ? vf_min(l, vf_set(most)) : in_a_byte(l));
            error += w[i] * e * e;
        }
        vi better = (error < least) | vi_set(-(k == 0));
        vf_keep(better, &least, error);
        vf_keep(better, &factor, f);
    }
    for (int i = 0; i < n; i++) {
        s[i] = vf_min(vf_round(factor * x[i]), vf_set(most));
        lx += w[i] * x[i] * s[i];
        ll += w[i] * s[i] * s[i];
        s[i] = in_a_byte(s[i]);
    }
    for (int sweep = 0; sweep < 5; sweep++) {
        for (int i = 0; i < n; i++) {
            vf wx = w[i] * x[i], other_lx = lx - wx * s[i], other_ll = ll - w[i] * s[i] * s[i];
            vi possible = (other_lx > 0) & (other_ll > 0);
            vf l = vf_min(vf_round(x[i] * other_ll / other_lx), vf_set(most)), new_lx = other_lx + wx * l, new_ll = other_ll + w[i] * l * l;
            vi better = possible & (l != s[i]) & (new_lx * new_lx * ll > lx * lx * new_ll);
            vf_keep(better, &s[i], in_a_byte(l));
            vf_keep(better, &lx, new_lx);
            vf_keep(better, &ll, new_ll);
        }
    }
    return vf_select(ll > 0, lx / ll, vf_set(0));
}
// The scales of 4 groups of 16 values on -4 .. 3 under the weights x^2: the top on -4, then single codes are moved while that helps.
INLINE void scales_by_moves(const vf *x, vf *scale) {
    vf l[4][16], lx[4], ll[4];
    for (int g = 0; g < 4; g++) {
        vf factor = -4.0f * vf_inverse(signed_top(16, x + 16 * g));
        lx[g] = ll[g] = vf_set(0);
        for (int i = 0; i < 16; i++) {
            vf xi = x[16 * g + i], w = xi * xi;
            l[g][i] = vf_clamp(vf_round(factor * xi), -4, 3);
            lx[g] += w * xi * l[g][i];
            ll[g] += w * l[g][i] * l[g][i];
        }
    }
    vi any = vi_set(-1);
    for (int sweep = 0; sweep < 5 && vi_any(any); sweep++) {
        any = vi_set(0);
        for (int i = 0; i < 16; i++) {
            UNROLL(4) for (int g = 0; g < 4; g++) {        // a step of one group waits for its step before, not for the others'
                vf xi = x[16 * g + i], w = xi * xi, wx = w * xi, other_lx = lx[g] - wx * l[g][i], other_ll = ll[g] - w * l[g][i] * l[g][i];
                vf moved = vf_clamp(vf_round(xi * other_ll / other_lx), -4, 3);
                vf new_lx = other_lx + wx * moved, new_ll = other_ll + w * moved * moved;
                vi better = (other_lx > 0) & (moved != l[g][i]) & (new_ll > 0) & (new_lx * new_lx * ll[g] > lx[g] * lx[g] * new_ll);
                vf_keep(better, &l[g][i], moved);
                vf_keep(better, &lx[g], new_lx);
                vf_keep(better, &ll[g], new_ll);
                any |= better;
            }
        }
    }
    for (int g = 0; g < 4; g++) scale[g] = vf_select(ll[g] > 0, lx[g] / ll[g], vf_set(0));
}
// Integers for given scales: the largest gets `extreme`, the others the nearest.
INLINE vf nearest_multipliers(int n, float extreme, float low, float high, const vf *scale, vf *s) {
    vf top = scale[0];
    for (int g = 1; g < n; g++) top = vf_select(vf_abs(scale[g]) > vf_abs(top), scale[g], top);
    vf factor = extreme * vf_inverse(top);
    for (int g = 0; g < n; g++) s[g] = vf_clamp(vf_round(factor * scale[g]), low, high);
    return vf_half(top / extreme);
}
typedef enum { BY_SQUARES, BY_MAGNITUDES } measure;                        // the least of what: w e e, w |e|
// Scale and minimum for codes 0..top, the minimum at most 0. The range reaches from the best minimum so far to the largest weight.
INLINE affine_fit compat_affine(float top, measure by, affine_candidates c, int n, const vf *x, const vf *w) {
    vf low = x[0], high = low, sw = w[0], sx = w[0] * x[0];
    for (int i = 1; i < n; i++) {
        low = vf_min(low, x[i]);
        high = vf_max(high, x[i]);
        sw += w[i];
        sx += w[i] * x[i];
    }
    low = vf_min(low, vf_set(0));
    vi some = high > low;
    affine_fit best = {(vf)((vi)(1.0f / (top / (high - low))) & some), low, {0}, low, vf_set(-INFINITY)};
    for (int i = -1; i < c.n; i++) {             // first the range itself, as it is
        vf a = best.scale, m = best.minimum, base = m, factor = (vf)((vi)((i < 0 ? top : c.from + c.step * i) / (high - base)) & some);
        affine_sums s = {{0}, {0}, {0}};
        for (int j = 0; j < n; j++) {
            vf q = affine_code(x[j], base, factor, top), wq = w[j] * q;
            s.q += wq;
            s.qq += wq * q;
            s.xq += wq * x[j];
        }
        vi solved = some;
        if (i >= 0) {
            vf det = sw * s.qq - s.q * s.q;
            solved &= det > 0;
            a = (sw * s.xq - sx * s.q) / det;
            m = (s.qq * sx - s.q * s.xq) / det;
            vi over = m > 0;
            vf_keep(over, &m, vf_set(0));
            vf_keep(over, &a, s.xq / s.qq);
        }
        vf gain = {0};
        for (int j = 0; j < n; j++) {
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
INLINE void compat_scaled_affine(float top, float most, affine_candidates c, measure by, int weighted, int groups, int n, const vf *x, const vf *w,
                                 fitted *out) {
    vf scale[MAX_GROUPS], minimum[MAX_GROUPS], sw[MAX_GROUPS];
    for (int g = 0; g < groups; g++) {
        affine_fit a = compat_affine(top, by, c, n, x + g * n, w + g * n);
        scale[g] = a.scale;
        minimum[g] = -a.minimum;
    }
    if (weighted) {
        group_weights(groups, n, w, sw);
        out->d = vf_half(positive_multipliers(groups, most, scale, sw, out->s));
        out->dmin = vf_half(positive_multipliers(groups, most, minimum, sw, out->m));
    } else {
        out->d = nearest_multipliers(groups, most, 0, most, scale, out->s);
        out->dmin = nearest_multipliers(groups, most, 0, most, minimum, out->m);
    }
}
