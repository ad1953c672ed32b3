// What the errors of a block's weights cost: how much each counts, and how much more those that go together.
#pragma once

// How much an error in a weight counts. Without importance by the weight's size, with it by importance * sqrt(a mean square + x^2).
// MEAN_AND_SQUARE and OF_ONES, as with an importance of one, are for codebooks only (pack_grids.h).
typedef enum { EQUAL, SQUARE, MAGNITUDE, RMS_AND_MAGNITUDE, MEAN_AND_SQUARE, OF_ONES } plain_weights;
typedef enum { AS_GIVEN, WITH_ROW, WITH_BLOCK, WITH_TWICE_BLOCK } importance_weights;
INLINE vf vf_weight(vf importance, vf square, vf x) { return importance * vf_sqrt(square + x * x); }

// t->x is filled, t->w holds the importance if there is one. row: the mean square of each block's row.
INLINE void weigh(plain_weights plain, importance_weights given, int weighted, vf row, int n, const vf *x, vf *w) {
    if (weighted && given == AS_GIVEN) return;
    vf square = {0};
    for (int i = 0; i < n; i++) square += x[i] * x[i];
    square = given == WITH_ROW ? row : square * ((given == WITH_TWICE_BLOCK ? 2.0f : 1.0f) / n);
    for (int i = 0; i < n; i++) {
        if (weighted) w[i] = vf_weight(w[i], square, x[i]);
        else if (plain == EQUAL) w[i] = vf_set(1);
        else if (plain == SQUARE) w[i] = x[i] * x[i];
        else if (plain == MAGNITUDE) w[i] = vf_abs(x[i]);
        else {
            if (i % 32 == 0) {
                square = vf_set(0);
                for (int j = i; j < i + 32; j++) square += x[j] * x[j];
                square = vf_sqrt(square / 32.0f);
            }
            w[i] = square + vf_abs(x[i]);
        }
    }
}

// An error along the weights themselves counts COHERENCE times as much as one across them. Coarse codes of least squares shrink the weights
// (by 6 % in two bits); the inputs of a layer go together, so such errors add up from column to column and from layer to layer, where
// others cancel: divergence is least when the shrinking is taken back almost whole.
#define COHERENCE 4.0f
// Of errors e of weights x, each product weighted: sums of e e, e x, x x.
INLINE float loss_of(float ee, float ex, float xx) { return ee + (xx > 0 ? (COHERENCE - 1) * ex * ex / xx : 0); }

typedef struct { float xx, xv, vv; } moments;              // sums over weights x and values v of w x x, w x v, w v v
INLINE moments moments_of(int n, const float *x, const float *w, const float *v) {
    vf xx = {0}, xv = {0}, vv = {0};
    for (int i = 0; i < n; i += VL) {
        vf wx = vf_load(w + i) * vf_load(x + i), wv = vf_load(w + i) * vf_load(v + i);
        xx = vf_fma(wx, vf_load(x + i), xx);
        xv = vf_fma(wx, vf_load(v + i), xv);
        vv = vf_fma(wv, vf_load(v + i), vv);
    }
    return (moments){vf_sum(xx), vf_sum(xv), vf_sum(vv)};
}
// The loss of scale * v.
INLINE float loss_at(moments m, float scale) { return loss_of(m.xx - 2 * scale * m.xv + scale * scale * m.vv, m.xx - scale * m.xv, m.xx); }
// The scale of least loss is COHERENCE * xv / this.
INLINE float curvature(moments m) { return m.xx > 0 ? m.vv + (COHERENCE - 1) * m.xv * m.xv / m.xx : 0; }
INLINE float best_scale(moments m) { float c = curvature(m); return c > 0 ? COHERENCE * m.xv / c : 0; }
