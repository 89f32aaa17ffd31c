#include <algorithm>

#include "appended_rows.h"
#include "cache_primitives.h"
#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
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

// Gives `whole` memory with the first `at` rows of `buffer`, and returns the
// next ones, which are to be written.
mx::array begin_append(
    const mx::Stream& stream,
    const mx::array& buffer,
    int at,
    int count,
    mx::array& whole) {
  const auto allocate = [](mx::array& a) { metal::allocate(a); };
  if (!place_appended(buffer, at, at + count, whole, allocate)) {
    copy(stream, rows_between(buffer, 0, at), rows_between(whole, 0, at));
  }
  return rows_between(whole, at, at + count);
}

}  // namespace

void AppendRows::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const int count = inputs[1].shape(2);
  std::vector<mx::array> places;
  for (size_t i = 0; i < outputs.size(); i++) {
    places.push_back(
        begin_append(stream(), inputs[2 * i], at_, count, outputs[i]));
  }
  if (outputs.size() == 2 && inputs[1].size() > 0 && inputs[3].size() > 0) {
    copy_pair(stream(), inputs[1], places[0], inputs[3], places[1]);
    return;
  }
  for (size_t i = 0; i < outputs.size(); i++) {
    copy(stream(), inputs[2 * i + 1], places[i]);
  }
}

void AppendPacked::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const mx::array& values = inputs[1];
  const int count = values.shape(2);
  auto to = begin_append(stream(), inputs[0], at_, count, outputs[0]);
  if (values.size() == 0) {
    return;
  }
  const bool fp8 = layout_.format == RowFormat::fp8;
  const mx::array& ropes = inputs.back();  // never touched where there are none
  PackParams params{
      view_of(values),
      view_of(ropes),
      view_of(to),
      fp8 ? kScaleTile : layout_.rank,
      static_cast<int>(scale_count(layout_.format, layout_.rank))};
  params.ropes.columns = layout_.rope;
  metal::Encoder encoder(stream());
  encoder.set_compute_pipeline_state(encoder.kernel(
      {metal_source::append_rows,
       "pack_rows",
       {values.dtype(), metal::Argument::packing(layout_.format)}}));
  encoder.set_input_array(values, 0);
  encoder.set_input_array(ropes, 1);
  encoder.set_output_array(to, 2);
  encoder.set_bytes(params, 3);
  encoder.dispatch_threadgroups(
      MTL::Size(params.scales + (layout_.rope > 0), values.shape(0) * count, 1),
      MTL::Size(32, 1, 1));
}

}  // namespace glm_fused
