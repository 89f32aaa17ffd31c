#include "metal/compile.h"

#include <unordered_set>

#include "cache_primitives.h"
#include "metal/pipelines.h"
#include "ops/metal_blocks.h"
#include "ops/placement.h"

namespace glm_fused::metal {

namespace {

// Has `memory`, which nothing reads, where `a` has none yet. As others hold it,
// too, nothing is written in place.
mx::array with_memory(const mx::array& a, const mx::array& memory) {
  if (a.is_available()) {
    return a;
  }
  mx::array made(a.shape(), a.dtype(), nullptr, {});
  made.copy_shared_buffer(
      memory, made.strides(), {true, true, false}, made.size());
  return made;
}

template <class... Primitives>
bool is_any_of(mx::Primitive& primitive) {
  return ((dynamic_cast<Primitives*>(&primitive) != nullptr) || ...);
}

// Tells whether the primitive has a launcher. In a rehearsal none waits.
bool has_launcher(mx::Primitive& primitive) {
  return is_metal(primitive.stream()) &&
      is_any_of<
             AppendPacked,
             AppendRows,
             ExpertSum,
             IndexerTopk,
             LayerNorm,
             MetalAttend,
             MetalAttentionOutput,
             MetalAttentionProject,
             MetalMlpBlock,
             MetalMoeBlock,
             MetalStreamedMoe,
             MoeDecode,
             RmsNorm,
             Rotate,
             RouterTopk,
             SparseMlaDecode,
             Swiglu>(primitive);
}

// Runs the launcher of the node that makes `output`, in a rehearsal.
void rehearse(const mx::array& output) {
  mx::Primitive& primitive = placed(output.primitive());
  if (!has_launcher(primitive)) {
    return;
  }
  const mx::array memory = allocate({1}, mx::uint8);
  std::vector<mx::array> inputs, outputs;
  for (const mx::array& input : output.inputs()) {
    inputs.push_back(with_memory(input, memory));
  }
  for (const mx::array& made : output.outputs()) {
    outputs.emplace_back(
        made.shape(), made.dtype(), nullptr, std::vector<mx::array>());
  }
  primitive.eval_gpu(inputs, outputs);
}

}  // namespace

int compile_kernels(
    const std::vector<mx::array>& outputs,
    const std::function<void(int, int)>& progress) {
  std::vector<mx::array> left = outputs;
  std::unordered_set<std::uintptr_t> seen;
  std::vector<KernelName> missing;
  {
    Rehearsal rehearsal;
    while (!left.empty()) {
      const mx::array a = left.back();
      left.pop_back();
      if (a.is_available() || !a.has_primitive() ||
          !seen.insert(a.primitive_id()).second) {
        continue;
      }
      rehearse(a);
      left.insert(left.end(), a.inputs().begin(), a.inputs().end());
    }
    missing = std::move(rehearsal.missing);
  }
  const int total = static_cast<int>(missing.size());
  if (total > 0) {
    progress(0, total);
    compile(missing, [&](int done) { progress(done, total); });
  }
  return total;
}

}  // namespace glm_fused::metal
