#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"
#include "view.h"

namespace glm_fused {

namespace {

// A simdgroup takes a row.
void encode(
    const mx::Stream& stream,
    const char* function,
    const std::vector<mx::array>& inputs,
    float eps,
    mx::array& y) {
  metal::allocate(y);
  if (y.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream);
  metal::KernelName name(metal_source::norms, function);
  for (const auto& input : inputs) {
    name.add(input.dtype());
  }
  encoder.set_compute_pipeline_state(encoder.kernel(name));
  int index = 0;
  for (const auto& input : inputs) {
    encoder.set_input_array(input, index++);
  }
  encoder.set_output_array(y, index++);
  const NormParams params{view_of(inputs[0]), eps};
  encoder.set_bytes(params, index);
  encoder.dispatch_threadgroups(
      MTL::Size(y.size() / params.x.columns, 1, 1), MTL::Size(32, 1, 1));
}

}  // namespace

void RmsNorm::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  encode(stream(), "rms_norm", inputs, eps_, outputs[0]);
}

void LayerNorm::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  encode(stream(), "layer_norm", inputs, eps_, outputs[0]);
}

}  // namespace glm_fused
