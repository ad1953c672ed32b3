// ggml's own choices for the codebook types (see compat.h): the same candidates, weights, neighbours and factors.
#pragma once

// Scale and magnitudes of a group. ggml counts levels as odd numbers, whatever they stand for, and weighs distances to entries with the root.
static float compat_magnitudes(const grid_type *type, const grid *g, const float *x, const float *w, grid_group *c) {
    static const float odd[MAX_LEVELS] = {1, 3, 5, 7, 9, 11, 13, 15};
    int n = type->group, entries = n / type->width, off[8] = {0};
    float magnitude[32], root[32], most = odd[g->n_levels - 1], top = 0, scale, best = 0;
    memset(c, 0, sizeof *c);
    for (int i = 0; i < n; i += 8) {
        int minus = 0, weakest = i;
        for (int j = i; j < i + 8; j++) {
            minus |= (x[j] < 0) << (j - i);
            magnitude[j] = fabsf(x[j]);
            root[j] = sqrtf(w[j]);
            if (w[j] * x[j] * x[j] < w[weakest] * x[weakest] * x[weakest]) weakest = j;
        }
        if (type->span && __builtin_parity(minus)) {
            minus ^= 1 << (weakest - i);
            magnitude[weakest] = -magnitude[weakest];
        }
        c->minus[i / 8] = minus;
    }
    for (int i = 0; i < n; i++) top = magnitude[i] > top ? magnitude[i] : top;
    if (!(top > 1e-15f)) return memset(c->minus, 0, sizeof c->minus), 0;
    scale = top / most;
    if (type->refine == ALL) {                   // a first scale from integers 0 .. 4; its third multiple is the top from which candidates differ
        vf xv[32], wv[32], s[32];
        for (int i = 0; i < n; i++) xv[i] = vf_set(magnitude[i]), wv[i] = vf_set(w[i]);
        scale = positive_multipliers(n, 4, xv, wv, s)[0];
        top = 3 * scale;
        if (!(top > 0)) return memset(c->minus, 0, sizeof c->minus), 0;
    }
    for (int i = -type->reach; i <= type->reach + 1; i++) {    // in the end once more with the scale that was found
        int last = i > type->reach, any_off = 0, now_off[8];
        float factor = last ? 1 / scale : (most + i * type->reach_step) / top, t[32], xv = 0, vv = 0;
        uint16_t entry[8];
        uint8_t level[32];
        for (int k = 0; k < entries; k++) any_off |= off[k];
        if (last && !(scale > 0 && (type->refine == ALL || any_off))) break;
        for (int k = 0; k < entries; k++) {
            int from = k * type->width;
            for (int j = from; j < from + type->width; j++) {
                float l = nearbyintf(0.5f * (factor * magnitude[j] - 1));
                t[j] = factor * magnitude[j];
                level[j] = l < 0 ? 0 : l > g->n_levels - 1 ? g->n_levels - 1 : (int)l;
            }
            now_off[k] = g->near[pattern_of(g, level + from)].start >= 0;
            entry[k] = last && type->refine == OFF_GRID && !off[k] ? c->entry[k] :
                nearest_entry(g, t + from, level + from, root + from, &g->odd, &(ggml_measure){magnitude + from, last ? scale : 1 / factor, 0});
            for (int j = 0; j < type->width; j++) {
                float q = odd[g->level[entry[k] * type->width + j]];
                xv += w[from + j] * magnitude[from + j] * q;
                vv += w[from + j] * q * q;
            }
        }
        if (last ? vv > 0 : vv > 0 && xv * xv > best * vv) {
            scale = xv / vv;
            best = scale * xv;
            memcpy(c->entry, entry, sizeof entry);
            memcpy(off, now_off, sizeof off);
        }
    }
    if (scale < 0)
        for (int k = 0; k < 4; k++) c->minus[k] = ~c->minus[k];
    return fabsf(scale);
}

// Scale and ternary values of a group: sorted weights are split into three runs, every split is tried with every choice of shifts (one for the
// group, or one for each half), then patterns give way to entries.
static float compat_ternary(const grid_type *type, const grid *g, const float *x, const float *w, grid_group *c) {
    int n = type->group, half = type->span < n ? n / 2 : n, halves = n / half, order[32], best_low = 0, best_high = 0, best_down = -1, off = 0;
    float sx[2][33] = {{0}}, sw[2][33] = {{0}}, best = 0, scale = 0;
    memset(c, 0, sizeof *c);
    if (!(abs_max(n, x) > 1e-12f)) return 0;
    for (int i = 0; i < n; i++) {
        int at = i;
        for (; at > 0 && x[order[at - 1]] > x[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    for (int i = 0; i < n; i++)
        for (int h = 0; h < halves; h++) {
            int own = order[i] / half == h;
            sx[h][i + 1] = sx[h][i] + (own ? w[order[i]] * x[order[i]] : 0);
            sw[h][i + 1] = sw[h][i] + (own ? w[order[i]] : 0);
        }
    for (int low = 0; low <= n; low++)
        for (int high = low; high <= n; high++)
            for (int down = 0; down < 1 << halves; down++) {   // a bit for each half, the first on top: shifted down
                float xv = 0, vv = 0;
                for (int h = 0; h < halves; h++) {
                    float shift = down >> (halves - 1 - h) & 1 ? -EIGHTH : EIGHTH, v0 = -1 + shift, v1 = shift, v2 = 1 + shift;
                    xv += sx[h][n] * v2 - sx[h][low] - sx[h][high];
                    vv += sw[h][low] * v0 * v0 + (sw[h][high] - sw[h][low]) * v1 * v1 + (sw[h][n] - sw[h][high]) * v2 * v2;
                }
                if (vv > 0 && xv * xv > best * vv) scale = xv / vv, best = scale * xv, best_low = low, best_high = high, best_down = down;
            }
    if (best_down < 0) return 0;
    uint8_t level[32];
    for (int i = 0; i < n; i++) level[order[i]] = (i >= best_low) + (i >= best_high);
    if (scale < 0) {
        for (int i = 0; i < n; i++) level[i] = 2 - level[i];
        scale = -scale;
        best_down ^= (1 << halves) - 1;
    }
    float xv = 0, vv = 0;
    for (int k = 0; k < n / 8; k++) {
        int down = c->down[k] = best_down >> (halves - 1 - 8 * k / half) & 1;
        float shift = down ? -EIGHTH : EIGHTH, t[8];
        for (int j = 0; j < 8; j++) t[j] = x[8 * k + j] / scale - shift;
        off |= g->near[pattern_of(g, level + 8 * k)].start >= 0;
        int e = c->entry[k] = nearest_entry(g, t, level + 8 * k, w + 8 * k, &g->own, &(ggml_measure){x + 8 * k, scale, shift});
        for (int j = 0; j < 8; j++) {
            float v = c->value[8 * k + j] = g->value[8 * e + j] + shift;
            xv += w[8 * k + j] * v * x[8 * k + j];
            vv += w[8 * k + j] * v * v;
        }
    }
    return off && xv > 0 && vv > 0 ? xv / vv : scale;
}

static void compat_grid(const grid_type *type, const grid *grid, const float *x, const float *w, grid_block *out) {
    int groups = 256 / type->group, odd_most = 2 * type->most + 1;
    float scale[MAX_GROUPS], value[256], top = 0, xv = 0, vv = 0;
    memset(out, 0, sizeof *out);
    for (int g = 0; g < groups; g++) {
        grid_group c;
        scale[g] = (is_ternary(type) ? compat_ternary : compat_magnitudes)(type, grid, x + g * type->group, w + g * type->group, &c);
        if (scale[g] > top) top = scale[g];
        keep_group(type, g, &c, 0, out);
        memcpy(value + g * type->group, c.value, type->group * sizeof *value);
    }
    if (!(top > 0)) return;
    float d = top / odd_most;
    for (int g = 0; g < groups; g++) {
        float s = nearbyintf(0.5f * (scale[g] / d - 1));
        out->s[g] = s < 0 ? 0 : s > type->most ? type->most : (int)s;
        for (int i = g * type->group; i < (g + 1) * type->group; i++) {
            float v = value[i] * (2 * out->s[g] + 1);
            xv += w[i] * v * x[i];
            vv += w[i] * v * v;
        }
    }
    if (is_ternary(type) && type->span < type->group && vv > 0) d = xv / vv;       // IQ1_M alone fits it once more
    out->d = d * type->stretch;
}
