#include "metal/experts.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"

namespace glm_fused {

namespace {

constexpr int kThreads = 256;

metal::KernelName of_type(const char* function, const mx::array& a) {
  return {metal_source::expert_sum, function, {a.dtype()}};
}

}  // namespace

namespace metal {

void expert_sum(
    Encoder& encoder,
    const mx::array& y,
    const mx::array& scores,
    mx::array& sum) {
  encoder.set_compute_pipeline_state(encoder.kernel(of_type("expert_sum", y)));
  encoder.set_input_array(y, 0);
  encoder.set_input_array(scores, 1);
  encoder.set_output_array(sum, 2);
  encoder.set_bytes(static_cast<int>(y.shape(1)), 3);
  encoder.set_bytes(static_cast<int>(y.shape(2)), 4);
  encoder.dispatch_threads(
      MTL::Size(y.shape(2), y.shape(0), 1), MTL::Size(kThreads, 1, 1));
}

}  // namespace metal

void Swiglu::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& act = outputs[0];
  metal::allocate(act);
  if (act.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream());
  encoder.set_compute_pipeline_state(encoder.kernel(of_type("swiglu", act)));
  encoder.set_input_array(inputs[0], 0);
  encoder.set_input_array(inputs[1], 1);
  encoder.set_output_array(act, 2);
  encoder.dispatch_threads(
      MTL::Size(act.size(), 1, 1), MTL::Size(kThreads, 1, 1));
}

void ExpertSum::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& sum = outputs[0];
  metal::allocate(sum);
  if (sum.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream());
  metal::expert_sum(encoder, inputs[0], inputs[1], sum);
}

}  // namespace glm_fused
