#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"
#include "view.h"

namespace glm_fused {

void Rotate::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& y = outputs[0];
  metal::allocate(y);
  if (y.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream());
  encoder.set_compute_pipeline_state(
      encoder.kernel({metal_source::rotate, "rotate_rows", {y.dtype()}}));
  for (int i = 0; i < 3; i++) {
    encoder.set_input_array(inputs[i], i);
  }
  encoder.set_output_array(y, 3);
  const RotateParams params{
      view_of(inputs[0]), view_of(inputs[1]), view_of(inputs[2]), interleaved_};
  encoder.set_bytes(params, 4);
  const int columns = params.x.columns;
  encoder.dispatch_threads(
      MTL::Size(columns - params.cosines.columns, y.size() / columns, 1),
      MTL::Size(32, 8, 1));
}

}  // namespace glm_fused
