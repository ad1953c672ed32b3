// Blocks of the codebook types from what search and compatibility choose, and their encoders.
#pragma once

// Importance is an estimate, and a codebook trades one weight against another: half of the mean is added to every column.
#define DAMPING 0.5f
// What the error of each weight counts.
static void grid_weights(const grid_type *type, const float *x, const float *importance, int search, float *w) {
    float mean = sum_of_squares(256, x) / 256, damping = 0;
    float square = search || type->given == WITH_TWICE_BLOCK ? 2 * mean : mean;
    if (search && importance) {
        for (int i = 0; i < 256; i++) damping += importance[i];
        damping *= DAMPING / 256;
    }
    for (int i = 0; i < 256; i += VL) {
        vf v = vf_load(x + i);
        vf_store(w + i, importance ? vf_weight(vf_load(importance + i) + damping, vf_set(square), v)
                      : search ? vf_set(1)
                      : type->plain == OF_ONES ? vf_weight(vf_set(1), vf_set(square), v)
                      : type->plain == SQUARE ? v * v : 0.5f * mean + v * v);
    }
}
typedef void grid_packer(const grid_block *f, void *block);
static int encode_grid(const grid_type *type, grid *_Atomic *kept, grid_packer *pack, int bytes, int64_t rows, int64_t n, const float *x,
                        uint8_t *dst, const float *importance, int search) {
    const grid *g = grid_of(type, kept);
    if (!g) return 1;
    memset(dst, 0, rows * (n / 256) * bytes);
    for (int64_t k = 0; k < rows * n; k += 256, dst += bytes) {
        float w[256];
        grid_block f;
        grid_weights(type, x + k, importance ? importance + k % n : NULL, search, w);
        (search ? search_grid : compat_grid)(type, g, x + k, w, &f);
        if (f.d > 0) pack(&f, dst);
    }
    return 0;
}

static void pack_nibble_pairs(const int *s, int n, uint8_t *packed) { for (int i = 0; i < n; i += 2) packed[i / 2] = s[i] | s[i + 1] << 4; }
// 28 bits of signs, seven for every 8 weights, and a scale.
static uint32_t signs_and_scale(const grid_block *f, int g) {
    uint32_t all = (uint32_t)f->s[g] << 28;
    for (int l = 0; l < 4; l++) all |= (uint32_t)(f->minus[4 * g + l] & 127) << 7 * l;
    return all;
}
static void pack_iq2_xxs(const grid_block *f, void *block) {
    block_iq2_xxs *b = block;
    b->d = f32_to_f16(f->d);
    for (int g = 0; g < 8; g++) {
        uint32_t words[2] = {0, signs_and_scale(f, g)};
        for (int l = 0; l < 4; l++) words[0] |= (uint32_t)f->entry[4 * g + l] << 8 * l;
        memcpy(b->qs + 4 * g, words, 8);
    }
}
static void pack_iq2_xs(const grid_block *f, void *block) {
    block_iq2_xs *b = block;
    b->d = f32_to_f16(f->d);
    pack_nibble_pairs(f->s, 16, b->scales);
    for (int l = 0; l < 32; l++) b->qs[l] = f->entry[l] | (f->minus[l] & 127) << 9;
}
static void pack_iq2_s(const grid_block *f, void *block) {
    block_iq2_s *b = block;
    b->d = f32_to_f16(f->d);
    pack_nibble_pairs(f->s, 16, b->scales);
    for (int l = 0; l < 32; l++) {
        b->qs[l] = f->entry[l] & 255;
        b->qs[32 + l] = f->minus[l];
        b->qh[l / 4] |= (f->entry[l] >> 8) << 2 * (l % 4);
    }
}
static void pack_iq3_xxs(const grid_block *f, void *block) {
    block_iq3_xxs *b = block;
    b->d = f32_to_f16(f->d);
    for (int l = 0; l < 64; l++) b->qs[l] = f->entry[l];
    for (int g = 0; g < 8; g++) {
        uint32_t word = signs_and_scale(f, g);
        memcpy(b->qs + 64 + 4 * g, &word, 4);
    }
}
static void pack_iq3_s(const grid_block *f, void *block) {
    block_iq3_s *b = block;
    b->d = f32_to_f16(f->d);
    pack_nibble_pairs(f->s, 8, b->scales);
    memcpy(b->signs, f->minus, 32);
    for (int l = 0; l < 64; l++) {
        b->qs[l] = f->entry[l] & 255;
        b->qh[l / 8] |= (f->entry[l] >> 8) << l % 8;
    }
}
static void pack_iq1_s(const grid_block *f, void *block) {
    block_iq1_s *b = block;
    b->d = f32_to_f16(f->d);
    for (int g = 0; g < 8; g++) {
        b->qh[g] = f->s[g] << 12 | f->down[4 * g] << 15;
        for (int l = 4 * g; l < 4 * g + 4; l++) {
            b->qs[l] = f->entry[l] & 255;
            b->qh[g] |= (f->entry[l] >> 8) << 3 * (l % 4);
        }
    }
}
static void pack_iq1_m(const grid_block *f, void *block) {
    block_iq1_m *b = block;
    uint64_t words = 0;
    f16 d = f32_to_f16(f->d);
    for (int i = 0; i < 16; i++) words |= (uint64_t)f->s[i] << (16 * (i / 4) + 3 * (i % 4));
    for (int i = 0; i < 4; i++) words |= (uint64_t)(d.bits >> 4 * i & 15) << (16 * i + 12);
    memcpy(b->scales, &words, 8);
    for (int l = 0; l < 32; l++) {
        b->qs[l] = f->entry[l] & 255;
        b->qh[l / 2] |= (f->entry[l] >> 8 | f->down[l] << 3) << 4 * (l % 2);
    }
}

#define GRID_ENCODER(name)                                                                              \
    static int encode_##name(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) { \
        static grid *_Atomic kept;                                                                      \
        return encode_grid(&grid_##name, &kept, pack_##name, sizeof(block_##name), rows, n, x, dst, importance, search); \
    }
GRID_ENCODER(iq2_xxs) GRID_ENCODER(iq2_xs) GRID_ENCODER(iq2_s) GRID_ENCODER(iq3_xxs) GRID_ENCODER(iq3_s) GRID_ENCODER(iq1_s) GRID_ENCODER(iq1_m)
