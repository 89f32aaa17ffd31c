// Writes llama.cpp's logits of a prompt: float32 [tokens, vocabulary] on
// stdout.
//
//     gguf_logits MODEL.gguf THREADS < tokens as int32
//
// Caches are float32, and attention is not the fused kernel that rounds more:
// what is left to differ is the arithmetic of the weights.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s MODEL.gguf THREADS < TOKENS\n", argv[0]);
    return 2;
  }
  std::vector<llama_token> tokens;
  for (int32_t token; std::fread(&token, sizeof token, 1, stdin) == 1;) {
    tokens.push_back(token);
  }
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model_params of_model = llama_model_default_params();
  of_model.n_gpu_layers = 0;
  llama_model* model = llama_model_load_from_file(argv[1], of_model);
  llama_context_params options = llama_context_default_params();
  options.n_ctx = options.n_batch = options.n_ubatch = tokens.size();
  options.n_threads = options.n_threads_batch = std::atoi(argv[2]);
  options.type_k = options.type_v = GGML_TYPE_F32;
  options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context* context =
      model == nullptr ? nullptr : llama_init_from_model(model, options);
  if (context == nullptr) {
    std::fprintf(stderr, "%s cannot be loaded.\n", argv[1]);
    return 1;
  }
  const int count = tokens.size();
  llama_batch batch = llama_batch_init(count, 0, 1);
  batch.n_tokens = count;
  for (int i = 0; i < count; ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = true;
  }
  if (llama_decode(context, batch) != 0) {
    std::fprintf(stderr, "llama_decode failed.\n");
    return 1;
  }
  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  for (int i = 0; i < count; ++i) {
    std::fwrite(
        llama_get_logits_ith(context, i), sizeof(float), vocabulary, stdout);
  }
  return 0;
}
