// quantize (temporary: replaced at merge)
static void quantize_q8_0(int64_t n, const float *x, void *dst, const float *imp) {
    (void)imp;
    for (block_q8_0 *b = dst; n > 0; n -= 32, x += 32, b++) {
        float a = 0; for (int i = 0; i < 32; i++) a = fmaxf(a, fabsf(x[i]));
        float d = a / 127, id = d ? 1 / d : 0; b->d = f32_to_f16(d);
        for (int i = 0; i < 32; i++) b->qs[i] = (int8_t)roundf(x[i] * id);
    }
}
static void quantize_q4_0(int64_t n, const float *x, void *dst, const float *imp) {
    (void)imp;
    for (block_q4_0 *b = dst; n > 0; n -= 32, x += 32, b++) {
        float a = 0, m = 0; for (int i = 0; i < 32; i++) if (fabsf(x[i]) > a) a = fabsf(x[i]), m = x[i];
        float d = m / -8, id = d ? 1 / d : 0; b->d = f32_to_f16(d);
        for (int i = 0; i < 16; i++) {
            int lo = (int)(x[i] * id + 8.5f), hi = (int)(x[i + 16] * id + 8.5f);
            b->qs[i] = (lo > 15 ? 15 : lo) | (hi > 15 ? 15 : hi) << 4;
        }
    }
}
#define QUANTIZE_TABLE {[8] = quantize_q8_0, [2] = quantize_q4_0}
