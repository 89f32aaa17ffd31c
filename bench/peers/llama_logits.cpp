// The logits that llama.cpp has for tokens:
// llama_logits [--float32-caches] MODEL TOKENS LOGITS
//
// TOKENS holds int32, LOGITS gets float32 [tokens, vocabulary]. With float32
// caches attention is not the fused kernel either, which rounds to fp16.
// logit_errors.py compiles it.

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::cerr << "llama_logits: " << what << "\n";
  std::exit(2);
}

std::vector<llama_token> read_tokens(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* first = reinterpret_cast<const llama_token*>(bytes.data());
  return {first, first + bytes.size() / sizeof(llama_token)};
}

}  // namespace

int main(int count, char** arguments) {
  const bool float32 =
      count > 1 && std::string(arguments[1]) == "--float32-caches";
  arguments += float32;
  if (count - float32 != 4)
    fail("expected [--float32-caches] MODEL TOKENS LOGITS");
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model =
      llama_model_load_from_file(arguments[1], llama_model_default_params());
  if (model == nullptr)
    fail(std::string(arguments[1]) + " cannot be loaded");
  const std::vector<llama_token> tokens = read_tokens(arguments[2]);
  const auto length = static_cast<int32_t>(tokens.size());
  if (length == 0)
    fail(std::string(arguments[2]) + " holds no tokens");

  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = static_cast<uint32_t>(length);
  const auto threads =
      static_cast<int32_t>(std::thread::hardware_concurrency());
  params.n_threads = params.n_threads_batch = threads;
  if (float32) {
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  }
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr)
    fail("no context for " + std::to_string(length) + " tokens");

  llama_batch batch = llama_batch_init(length, 0, 1);
  batch.n_tokens = length;
  for (int32_t i = 0; i < length; ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch) != 0)
    fail("the prompt cannot be decoded");
  const auto vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  std::ofstream file(arguments[3], std::ios::binary);
  for (int32_t i = 0; i < length; ++i) {
    const auto* row =
        reinterpret_cast<const char*>(llama_get_logits_ith(context, i));
    file.write(row, static_cast<std::streamsize>(sizeof(float)) * vocabulary);
  }
  if (!file.flush())
    fail(std::string(arguments[3]) + " cannot be written");
  return 0;
}
