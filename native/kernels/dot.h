// The dot product of a row of weights with a row of ggml's own activation blocks: Q8_0, Q8_1 or Q8_K (floats for F32, F16, BF16).
// Integers inside a scale group, floats between groups. This is the kernel that works for every type straight from the file.
#pragma once

#define ISUM_U7(codes, zero, a) ((zero) ? dot_biased(codes, zero, a) : dot_u7x32(codes, a))
#define ISUM_S8(codes, zero, a) dot_s8x32(codes, a)

INLINE i8x32 i8x32_load(const void *p) { i8x32 v; memcpy(&v, p, 32); return v; }
INLINE f32x8 group_scale(const float *scale, int span, int g) { return span == GROUP ? f32x8_set(scale[g]) : f32x8_pair(scale + 2 * g); }

// The loop over blocks: four at a time, each into its own sum, so that additions do not wait for one another. And over DOT_ROWS
// rows, `stride` bytes apart, that share the work on the activations and come from memory as so many streams.
enum { DOT_ROWS = 4 };
// Asks for the same place in the next DOT_ROWS rows, a line at a time; step: bytes of a row that one round of the loop reads.
INLINE void fetch_rows(const char *weights, int64_t stride, int64_t at, const int step) {
    if (!fetch_streams || at % LINE >= step) return;
    for (int r = 0; r < DOT_ROWS; r++)
        for (int line = 0; line < step || line == 0; line += LINE) __builtin_prefetch(weights + (DOT_ROWS + r) * stride + at + line);
}
typedef void rows_fn(int64_t n, const char *weights, int64_t stride, const void *activations, float *out);
#define DOT_LOOP(name, QK, act, PER_BLOCK)                                                              \
    static float dot_##name(int64_t n, const void *weights, const void *activations) {                  \
        const block_##name *b = weights;                                                                \
        const block_##act *a = activations;                                                             \
        f32x8 acc[4] = {{0}, {0}, {0}, {0}};                                                            \
        float mins = 0;                                                                                 \
        int64_t k = 0;                                                                                  \
        for (; k + 4 * QK <= n; k += 4 * QK, b += 4, a += 4 * (PER_BLOCK))                              \
            UNROLL(4)                                                                                   \
            for (int u = 0; u < 4; u++) acc[u] = dot_block_##name(b + u, a + u * (PER_BLOCK), acc[u], &mins); \
        for (; k < n; k += QK, b++, a += PER_BLOCK) acc[0] = dot_block_##name(b, a, acc[0], &mins);     \
        return f32x8_sum((acc[0] + acc[1]) + (acc[2] + acc[3])) + mins;                                 \
    }                                                                                                   \
    static void rows_##name(int64_t n, const char *weights, int64_t stride, const void *activations, float *out) { \
        const block_##act *a = activations;                                                             \
        f32x8 acc[DOT_ROWS] = {{0}, {0}, {0}, {0}};                                                     \
        float mins[DOT_ROWS] = {0};                                                                     \
        for (int64_t i = 0; i < n / QK; i++, a += PER_BLOCK) {                                          \
            fetch_rows(weights, stride, i * sizeof(block_##name), sizeof(block_##name));                \
            UNROLL(4)                                                                                   \
            for (int r = 0; r < DOT_ROWS; r++)                                                          \
                acc[r] = dot_block_##name((const block_##name *)(weights + r * stride) + i, a, acc[r], mins + r); \
        }                                                                                               \
        for (int r = 0; r < DOT_ROWS; r++) out[r] = f32x8_sum(acc[r]) + mins[r];                        \
    }

// One activation block per 32 weights.
#define DOT_q8_0(name, QK, SPAN, ZERO, SIGN, MIN)                                                       \
    INLINE f32x8 dot_block_##name(const block_##name *b, const block_q8_0 *a, f32x8 acc, float *mins) { \
        float scale[QK / SPAN], min[QK / SPAN];                                                         \
        (void)mins;                                                                                     \
        scales_##name(b, scale, min);                                                                   \
        UNROLL(4)                                                                                       \
        for (int g = 0; g < QK / GROUP; g++, a++) {                                                     \
            i32x8 isum = ISUM_##SIGN(codes_##name(b, g), ZERO, i8x32_load(a->qs));                      \
            acc = f32x8_fma(f32x8_from_i(isum), group_scale(scale, SPAN, g) * f16_to_f32(a->d), acc);   \
        }                                                                                               \
        return acc;                                                                                     \
    }                                                                                                   \
    DOT_LOOP(name, QK, q8_0, QK / GROUP)

// The same with mins: they meet the sum of the activation block, which it carries as a half float.
#define DOT_q8_1(name, QK, SPAN, ZERO, SIGN, MIN)                                                       \
    INLINE f32x8 dot_block_##name(const block_##name *b, const block_q8_1 *a, f32x8 acc, float *mins) { \
        float scale[1], min[1];                                                                         \
        scales_##name(b, scale, min);                                                                   \
        i32x8 isum = ISUM_##SIGN(codes_##name(b, 0), ZERO, i8x32_load(a->qs));                          \
        *mins += min[0] * f16_to_f32(a->s);                                                             \
        return f32x8_fma(f32x8_from_i(isum), f32x8_set(scale[0] * f16_to_f32(a->d)), acc);              \
    }                                                                                                   \
    DOT_LOOP(name, QK, q8_1, 1)

// One activation block per 256 weights, with the integer sum of every 16: zero points and mins meet those sums.
#define DOT_q8_K(name, QK, SPAN, ZERO, SIGN, MIN)                                                       \
    INLINE f32x8 dot_block_##name(const block_##name *b, const block_q8_K *a, f32x8 acc, float *mins) { \
        float scale[QK / SPAN], min[QK / SPAN];                                                         \
        (void)mins;                                                                                     \
        scales_##name(b, scale, min);                                                                   \
        f32x8 block[2] = {{0}, {0}};                                                                    \
        if (MIN || ZERO) {                                                                              \
            for (int i = 0; i < QK / SPAN; i += 8) {                                                    \
                i32x8 sums = SPAN == GROUP ? i32x8_pairs_i16(a->bsums) : i32x8_from_i16(a->bsums + i);  \
                f32x8 shift = MIN ? f32x8_load(min + i) : f32x8_load(scale + i) * (float)-(ZERO);       \
                block[0] = f32x8_fma(f32x8_from_i(sums), shift, block[0]);                              \
            }                                                                                           \
        }                                                                                               \
        UNROLL(8)                                                                                       \
        for (int g = 0; g < QK / GROUP; g++) {                                                          \
            i32x8 isum = ISUM_##SIGN(codes_##name(b, g), 0, i8x32_load(a->qs + GROUP * g));             \
            block[g % 2] = f32x8_fma(f32x8_from_i(isum), group_scale(scale, SPAN, g), block[g % 2]);    \
        }                                                                                               \
        return f32x8_fma(block[0] + block[1], f32x8_set(a->d), acc);                                    \
    }                                                                                                   \
    DOT_LOOP(name, QK, q8_K, 1)
#define DOT_none(name, QK, SPAN, ZERO, SIGN, MIN)
#define X(id, name, QK, SPAN, ZERO, SIGN, MIN, act) DOT_##act(name, QK, SPAN, ZERO, SIGN, MIN)
BLOCK_TYPES(X)
#undef X

// Floating-point weights with float activations.
#define DOT_PLAIN(name, ctype, load, to_float)                                                          \
    static float dot_##name(int64_t n, const void *weights, const void *activations) {                  \
        const char *w = weights;                                                                        \
        const float *a = activations;                                                                   \
        vf acc[4] = {{0}, {0}, {0}, {0}};                                                               \
        int64_t k = 0;                                                                                  \
        for (; k + 4 * VL <= n; k += 4 * VL)                                                            \
            UNROLL(4)                                                                                   \
            for (int u = 0; u < 4; u++)                                                                 \
                acc[u] = vf_fma(load(w + (k + u * VL) * sizeof(ctype)), vf_load(a + k + u * VL), acc[u]); \
        float sum = vf_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));                                      \
        for (; k < n; k++) {                                                                            \
            ctype v;                                                                                    \
            memcpy(&v, w + k * sizeof v, sizeof v);                                                     \
            sum += to_float(v) * a[k];                                                                  \
        }                                                                                               \
        return sum;                                                                                     \
    }                                                                                                   \
    static void rows_##name(int64_t n, const char *weights, int64_t stride, const void *activations, float *out) { \
        const float *a = activations;                                                                   \
        vf acc[DOT_ROWS] = {{0}, {0}, {0}, {0}};                                                        \
        int64_t k = 0;                                                                                  \
        for (; k + VL <= n; k += VL) {                                                                  \
            fetch_rows(weights, stride, k * sizeof(ctype), VL * sizeof(ctype));                         \
            UNROLL(4)                                                                                   \
            for (int r = 0; r < DOT_ROWS; r++)                                                          \
                acc[r] = vf_fma(load(weights + r * stride + k * sizeof(ctype)), vf_load(a + k), acc[r]); \
        }                                                                                               \
        for (int r = 0; r < DOT_ROWS; r++) {                                                            \
            out[r] = vf_sum(acc[r]);                                                                    \
            if (k < n) out[r] += dot_##name(n - k, weights + r * stride + k * sizeof(ctype), a + k);    \
        }                                                                                               \
    }
DOT_PLAIN(f32, float, vf_load, )
DOT_PLAIN(f16, f16, vf_from_f16, f16_to_f32)
DOT_PLAIN(bf16, bf16, vf_from_bf16, bf16_to_f32)

#define ENTRY_none(id, name)
#define ENTRY_q8_0(id, name) [id] = dot_##name,
#define ENTRY_q8_1(id, name) [id] = dot_##name,
#define ENTRY_q8_K(id, name) [id] = dot_##name,
#define DOT_ENTRY(id, name, QK, SPAN, ZERO, SIGN, MIN, act) ENTRY_##act(id, name)
#define DOT_TABLE {BLOCK_TYPES(DOT_ENTRY) [TYPE_f32] = dot_f32, [TYPE_f16] = dot_f16, [TYPE_bf16] = dot_bf16}

#define ROWS_none(id, name)
#define ROWS_q8_0(id, name) [id] = rows_##name,
#define ROWS_q8_1(id, name) [id] = rows_##name,
#define ROWS_q8_K(id, name) [id] = rows_##name,
#define ROWS_ENTRY(id, name, QK, SPAN, ZERO, SIGN, MIN, act) ROWS_##act(id, name)
static rows_fn *const DOTS_OF_ROWS[N_TYPES] = {BLOCK_TYPES(ROWS_ENTRY) [TYPE_f32] = rows_f32, [TYPE_f16] = rows_f16, [TYPE_bf16] = rows_bf16};
