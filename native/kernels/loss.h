// What the errors of a block's weights cost: how much each counts, and how much more those that go together.
#pragma once

// How much an error in a weight counts. Without importance by the weight's size, with it by importance * sqrt(a mean square + x^2).
// NEARLY_EQUAL: sqrt(16 mean squares + x^2), so that a weight of three times the usual size counts a quarter more.
// MEAN_AND_SQUARE and OF_ONES, as with an importance of one, are for codebooks only (pack_grids.h).
typedef enum { EQUAL, NEARLY_EQUAL, SQUARE, MAGNITUDE, RMS_AND_MAGNITUDE, MEAN_AND_SQUARE, OF_ONES } plain_weights;
typedef enum { AS_GIVEN, WITH_ROW, WITH_BLOCK, WITH_TWICE_BLOCK, WITH_FOURFOLD_BLOCK } importance_weights;
typedef struct { plain_weights plain; importance_weights given; } counting;
INLINE vf vf_weight(vf importance, vf square, vf x) { return importance * vf_sqrt(square + x * x); }

INLINE vf squares_of(int n, const vf *x) {             // lane by lane, in ggml's order
    vf sum = {0};
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}
// importance: of each weight, or NULL. row: the mean square of each block's row.
INLINE void weigh(counting c, const vf *importance, vf row, int n, const vf *x, vf *w) {
    static const float times[] = {[WITH_BLOCK] = 1, [WITH_TWICE_BLOCK] = 2, [WITH_FOURFOLD_BLOCK] = 4};
    const plain_weights plain = c.plain;
    if (importance && c.given == AS_GIVEN) memcpy(w, importance, n * sizeof *w);
    else if (importance) {
        vf square = c.given == WITH_ROW ? row : squares_of(n, x) * (times[c.given] / n);
        for (int i = 0; i < n; i++) w[i] = vf_weight(importance[i], square, x[i]);
    } else if (plain == NEARLY_EQUAL) {
        vf square = squares_of(n, x) * (16.0f / n);
        for (int i = 0; i < n; i++) w[i] = vf_weight(vf_set(1), square, x[i]);
    } else if (plain == EQUAL) for (int i = 0; i < n; i++) w[i] = vf_set(1);
    else if (plain == SQUARE) for (int i = 0; i < n; i++) w[i] = x[i] * x[i];
    else if (plain == MAGNITUDE) for (int i = 0; i < n; i++) w[i] = vf_abs(x[i]);
    else for (int i = 0; i < n; i += 32) {
        vf rms = vf_sqrt(squares_of(32, x + i) / 32.0f);
        for (int j = i; j < i + 32; j++) w[j] = rms + vf_abs(x[j]);
    }
}

// An error along the weights themselves counts COHERENCE times as much as one across them. Coarse codes of least squares shrink the weights
// (by 6 % in two bits); the inputs of a layer go together, so such errors add up from column to column and from layer to layer, where
// others cancel: divergence is least when the shrinking is taken back almost whole.
#define COHERENCE 4.0f
// Sums over weights x, their errors e and the values v that stand for them, each product weighted; in each lane those of a block or group.
typedef struct { vf xx, ex, ee; } errors;
typedef struct { vf xx, xv, vv; } moments;
INLINE vf loss_of(errors s) { return s.ee + (COHERENCE - 1) * vf_inverse(s.xx) * s.ex * s.ex; }
INLINE moments moments_of(errors s) { return (moments){s.xx, s.xx - s.ex, s.xx - 2.0f * s.ex + s.ee}; }
// The errors of scale * v.
INLINE errors errors_at(moments m, vf scale) { return (errors){m.xx, m.xx - scale * m.xv, m.xx - 2.0f * scale * m.xv + scale * scale * m.vv}; }
// The loss of scale * v is curvature * (scale - best_scale)^2 above the least. Weights that are all zero have no say in a scale.
INLINE vf curvature(moments m) { return vf_select(m.xx > 0, m.vv + (COHERENCE - 1) * vf_inverse(m.xx) * m.xv * m.xv, vf_set(0)); }
INLINE vf best_scale(moments m) { return COHERENCE * m.xv * vf_inverse(curvature(m)); }
