// dequantize (temporary: replaced at merge)
static void dequantize_row(int type, int64_t n, const void *src, float *dst) {
    for (int64_t i = 0; i < n; i++) {
        switch (type) {
        case 0: dst[i] = ((const float *)src)[i]; break;
        case 1: dst[i] = f16_to_f32(((const f16 *)src)[i]); break;
        case 30: dst[i] = bf16_to_f32(((const bf16 *)src)[i]); break;
        case 8: { const block_q8_0 *b = (const block_q8_0 *)src + i / 32; dst[i] = f16_to_f32(b->d) * b->qs[i % 32]; break; }
        case 2: { const block_q4_0 *b = (const block_q4_0 *)src + i / 32; int q = b->qs[i % 16]; dst[i] = f16_to_f32(b->d) * ((i % 32 < 16 ? q & 15 : q >> 4) - 8); break; }
        }
    }
}
#define DEQUANTIZE_TABLE {0}
