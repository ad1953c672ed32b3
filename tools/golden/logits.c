// Logits of llama.cpp for one text, computed on the CPU by one thread, without flash attention and repacked weights.
//
//     cc -I LLAMA/include -I LLAMA/ggml/include logits.c -o logits -L LIBRARIES -lllama -lggml-base -Wl,-rpath,LIBRARIES
//     logits MODEL.gguf TOKENS CONTINUATION f16|f32
//
// TOKENS: ids as int32, evaluated as one batch from position 0. CONTINUATION: how many tokens then follow greedily. f16|f32: the cache.
// Written to stdout: float32 logits, a row for each token of the text and for each that followed but the last.
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 256 };

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

// Evaluates n tokens from position `at` on; the logits of the last one.
static const float *evaluate(struct llama_context *context, const llama_token *tokens, int n, int at, int n_vocab) {
    struct llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = at + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch)) exit(3);
    llama_batch_free(batch);
    for (int i = 0; i < n; i++) fwrite(llama_get_logits_ith(context, i), sizeof(float), n_vocab, stdout);
    return llama_get_logits_ith(context, n - 1);
}

int main(int argc, char **argv) {
    if (argc != 5) return fprintf(stderr, "usage: %s MODEL TOKENS CONTINUATION f16|f32\n", argv[0]), 2;
    llama_log_set(quiet, NULL);
    llama_token tokens[CONTEXT];
    FILE *file = fopen(argv[2], "rb");
    if (!file) return perror(argv[2]), 1;
    int n = (int)fread(tokens, sizeof *tokens, CONTEXT, file);
    fclose(file);

    struct llama_model_params of_model = llama_model_default_params();
    of_model.n_gpu_layers = 0;
    of_model.use_extra_bufts = false;
    struct llama_model *model = llama_model_load_from_file(argv[1], of_model);
    if (!model) return 1;
    struct llama_context_params options = llama_context_default_params();
    options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT;
    options.n_threads = options.n_threads_batch = 1;
    options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    options.type_k = options.type_v = strcmp(argv[4], "f32") ? GGML_TYPE_F16 : GGML_TYPE_F32;
    struct llama_context *context = llama_init_from_model(model, options);
    if (!context) return 1;

    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const float *last = evaluate(context, tokens, n, 0, n_vocab);
    for (int left = atoi(argv[3]); left > 1; left--, n++) {
        llama_token next = 0;
        for (int id = 1; id < n_vocab; id++)
            if (last[id] > last[next]) next = id;
        last = evaluate(context, &next, 1, n, n_vocab);
    }
    return 0;
}
