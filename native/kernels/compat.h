// ggml's own choices of scales: the same candidates, weights and orders of summation, so that files have the error llama-quantize's have.
// Blocks stand side by side as in search.h, which also does the fits; here is what ggml does otherwise.
#pragma once

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
// The scale of n values on -4 .. 3 under the weights x^2: the top on -4, then single codes are moved while that helps.
INLINE vf scale_by_moves(int n, const vf *x) {
    vf factor = -4.0f * vf_inverse(signed_top(n, x)), l[16], lx = {0}, ll = {0};
    for (int i = 0; i < n; i++) {
        vf w = x[i] * x[i];
        l[i] = vf_clamp(vf_round(factor * x[i]), -4, 3);
        lx += w * x[i] * l[i];
        ll += w * l[i] * l[i];
    }
    for (int sweep = 0; sweep < 5; sweep++) {
        for (int i = 0; i < n; i++) {
            vf w = x[i] * x[i], wx = w * x[i], other_lx = lx - wx * l[i], other_ll = ll - w * l[i] * l[i];
            vf moved = vf_clamp(vf_round(x[i] * other_ll / other_lx), -4, 3), new_lx = other_lx + wx * moved, new_ll = other_ll + w * moved * moved;
            vi better = (other_lx > 0) & (moved != l[i]) & (new_ll > 0) & (new_lx * new_lx * ll > lx * lx * new_ll);
            vf_keep(better, &l[i], moved);
            vf_keep(better, &lx, new_lx);
            vf_keep(better, &ll, new_ll);
        }
    }
    return vf_select(ll > 0, lx / ll, vf_set(0));
}
// Integers for given scales: the largest gets `extreme`, the others the nearest.
INLINE vf nearest_multipliers(int n, float extreme, float low, float high, const vf *scale, vf *s) {
    vf top = scale[0];
    for (int g = 1; g < n; g++) top = vf_select(vf_abs(scale[g]) > vf_abs(top), scale[g], top);
    vf factor = extreme * vf_inverse(top);
    for (int g = 0; g < n; g++) s[g] = vf_clamp(vf_round(factor * scale[g]), low, high);
    return vf_half(top / extreme);
}
INLINE void compat_scaled_affine(float top, float most, affine_candidates c, measure by, int weighted, int groups, int n, const vf *x, const vf *w,
                                 fitted *out) {
    vf scale[MAX_GROUPS], minimum[MAX_GROUPS], sw[MAX_GROUPS];
    for (int g = 0; g < groups; g++) {
        affine_fit a = fit_affine(top, 1, by, c, n, x + g * n, w + g * n);
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
