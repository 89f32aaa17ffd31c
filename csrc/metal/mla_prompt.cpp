#include "metal/attend.h"
#include "metal/cached_rows.h"
#include "metal/limits.h"
#include "metal/source.h"

namespace glm_fused::metal {

namespace {

// As metal/mla_prompt.h has them.
constexpr int kHeads = 16;
constexpr int kSimdgroups = 8;
constexpr int kOwnColumns = 64;
constexpr int kOwnRopeColumns = 8;

}  // namespace

bool mla_prompt_takes(int rank, int rope) {
  return rank <= kSimdgroups * kOwnColumns &&
      rope <= kSimdgroups * kOwnRopeColumns;
}

void attend_prompt(const mx::Stream& stream, const Attended& a, mx::array& y) {
  Encoder encoder(stream);
  const mx::array& q = a.q;
  const int tokens = q.shape(0) * q.shape(1), heads = q.shape(2);
  const MlaParams params{
      rows_params(a.layout, a.latents, a.ropes, q.shape(1)),
      0,
      heads,
      a.selected ? a.selected->shape(2) : 0,
      0,
      a.scale};
  encoder.set_compute_pipeline_state(encoder.kernel(
      {metal_source::mla_prompt,
       "mla_prompt",
       {q.dtype(),
        Argument::cached_rows(a.layout, a.latents, a.ropes),
        load_unit(a.layout, a.latents, a.ropes, params.rows)}}));
  encoder.set_input_array(q, 0);
  encoder.set_input_array(a.latents, 1);
  encoder.set_input_array(a.ropes ? *a.ropes : a.latents, 2);
  encoder.set_input_array(a.selected ? *a.selected : a.start, 3);
  encoder.set_input_array(a.start, 4);
  encoder.set_output_array(y, 5);
  encoder.set_bytes(params, 6);
  encoder.dispatch_threadgroups(
      MTL::Size(blocks(heads, kHeads), tokens, 1),
      MTL::Size(32, kSimdgroups, 1));
}

}  // namespace glm_fused::metal
