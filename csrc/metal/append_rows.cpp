#include <algorithm>

#include "appended_rows.h"
#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"
#include "view.h"

namespace glm_fused {

namespace {

metal::KernelName typed(const char* function, const mx::array& a) {
  const int bytes = static_cast<int>(a.itemsize());
  return {metal_source::append_rows, function, {metal::Argument::word(bytes)}};
}

void copy(const mx::Stream& stream, const mx::array& from, mx::array to) {
  if (from.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream);
  encoder.set_compute_pipeline_state(encoder.kernel(typed("copy_rows", from)));
  encoder.set_input_array(from, 0);
  encoder.set_output_array(to, 1);
  encoder.set_bytes(CopyParams{view_of(from), view_of(to)}, 2);
  const int width = from.shape(3);
  encoder.dispatch_threads(
      MTL::Size(width, from.size() / width, 1), MTL::Size(32, 8, 1));
}

// Copies rows of one type and number in one launch.
void copy_pair(
    const mx::Stream& stream,
    const mx::array& from_a,
    mx::array to_a,
    const mx::array& from_b,
    mx::array to_b) {
  metal::Encoder encoder(stream);
  encoder.set_compute_pipeline_state(
      encoder.kernel(typed("copy_pair", from_a)));
  encoder.set_input_array(from_a, 0);
  encoder.set_output_array(to_a, 1);
  encoder.set_bytes(CopyParams{view_of(from_a), view_of(to_a)}, 2);
  encoder.set_input_array(from_b, 3);
  encoder.set_output_array(to_b, 4);
  encoder.set_bytes(CopyParams{view_of(from_b), view_of(to_b)}, 5);
  const int rows = from_a.shape(0) * from_a.shape(2);
  encoder.dispatch_threads(
      MTL::Size(std::max(from_a.shape(3), from_b.shape(3)), rows, 2),
      MTL::Size(32, 8, 1));
}

}  // namespace

void AppendRows::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto allocate = [](mx::array& a) { metal::allocate(a); };
  const int end = at_ + inputs[1].shape(2);
  std::vector<mx::array> places;
  for (size_t i = 0; i < outputs.size(); i++) {
    const mx::array& buffer = inputs[2 * i];
    if (!place_appended(buffer, at_, end, outputs[i], allocate)) {
      copy(
          stream(),
          rows_between(buffer, 0, at_),
          rows_between(outputs[i], 0, at_));
    }
    places.push_back(rows_between(outputs[i], at_, end));
  }
  if (outputs.size() == 2 && inputs[1].size() > 0 && inputs[3].size() > 0) {
    copy_pair(stream(), inputs[1], places[0], inputs[3], places[1]);
    return;
  }
  for (size_t i = 0; i < outputs.size(); i++) {
    copy(stream(), inputs[2 * i + 1], places[i]);
  }
}

}  // namespace glm_fused
