#include "appended_rows.h"
#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"
#include "view.h"

namespace glm_fused {

void AppendRows::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const mx::array &buffer = inputs[0], &rows = inputs[1];
  auto& encoder = mx::metal::get_command_encoder(stream());
  const auto copy = [&](const mx::array& from, mx::array to) {
    if (from.size() == 0) {
      return;
    }
    const std::string bits = std::to_string(8 * from.itemsize());
    encoder.set_compute_pipeline_state(
        metal::kernel(
            mx::metal::device(stream().device),
            metal_source::append_rows,
            "copy_rows<uint" + bits + "_t>"));
    encoder.set_input_array(from, 0);
    encoder.set_output_array(to, 1);
    encoder.set_bytes(CopyParams{view_of(from), view_of(to)}, 2);
    const int width = from.shape(3);
    encoder.dispatch_threads(
        MTL::Size(width, from.size() / width, 1), MTL::Size(32, 8, 1));
  };
  const auto allocate = [](mx::array& a) {
    a.set_data(mx::allocator::malloc(a.nbytes()));
  };
  const int end = at_ + rows.shape(2);
  if (!place_appended(buffer, at_, end, outputs[0], allocate)) {
    copy(rows_between(buffer, 0, at_), rows_between(outputs[0], 0, at_));
  }
  copy(rows, rows_between(outputs[0], at_, end));
}

}  // namespace glm_fused
