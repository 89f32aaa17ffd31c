// This takes the place of the launchers where MLX has no Metal.
#include "cache_primitives.h"
#include "metal/compile.h"
#include "metal/kernel_list.h"
#include "metal/limits.h"
#include "ops/metal_blocks.h"

namespace glm_fused {

namespace metal {

std::string moe_decode_obstacle(int, int) {
  return "this build has no Metal kernels";
}

std::string router_topk_obstacle(int) {
  return "this build has no Metal kernels";
}

std::string sparse_mla_decode_obstacle(int) {
  return "this build has no Metal kernels";
}

bool mla_prompt_takes(int, int) {
  return false;
}

bool index_prompt_takes(int) {
  return false;
}

size_t index_scratch_bytes(int, int, int) {
  return 0;
}

std::vector<ListedKernel> listed_kernels() {
  return {};
}

int64_t take_launches() {
  return 0;
}

int unembed_vectors(int, int, int, size_t) {
  return 0;
}

int compile_kernels(
    const std::vector<mx::array>&,
    const std::function<void(int, int)>&) {
  return 0;
}

}  // namespace metal

void MoeDecode::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void AppendRows::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void AppendPacked::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void RouterTopk::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void Swiglu::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void ExpertSum::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void RmsNorm::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void LayerNorm::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void Rotate::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void IndexerTopk::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void SparseMlaDecode::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  FusedPrimitive::eval_gpu(inputs, outputs);
}

void MetalAttentionProject::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  MetalBlock::eval_cpu(inputs, outputs);
}

void MetalAttentionOutput::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  MetalBlock::eval_cpu(inputs, outputs);
}

void MetalMlpBlock::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  MetalBlock::eval_cpu(inputs, outputs);
}

void MetalMoeBlock::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  MetalBlock::eval_cpu(inputs, outputs);
}

void MetalStreamedMoe::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  eval_cpu(inputs, outputs);
}

void MetalAttend::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  MetalBlock::eval_cpu(inputs, outputs);
}

}  // namespace glm_fused
