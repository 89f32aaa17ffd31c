#include "cache_primitives.h"
#include "ops/check_rows.h"
#include "ops/placement.h"

namespace glm_fused {

namespace {

// Checks the RoPE keys beside the latents, which floating rows have and packed
// ones do not.
void check_ropes(
    const std::string& op,
    const RowLayout& layout,
    const mx::array& latents,
    const std::optional<mx::array>& ropes) {
  const bool wanted = layout.format == RowFormat::floating && layout.rope > 0;
  if (ropes.has_value() != wanted) {
    invalid(
        op,
        "ropes must ",
        wanted ? "be given" : "be None",
        " for latents of ",
        latents.dtype(),
        " and ",
        layout.rope,
        " RoPE columns in q.");
  }
  if (wanted) {
    check_float(op, "ropes", *ropes);
    const mx::Shape shape = {latents.shape(0), latents.shape(1), layout.rope};
    check_shape(op, "ropes", *ropes, shape);
  }
}

}  // namespace

mx::array sparse_mla_decode(
    const mx::array& q,
    const mx::array& latents,
    const std::optional<mx::array>& ropes,
    const std::optional<mx::array>& selected,
    int rank,
    float scale,
    const std::optional<mx::array>& start,
    bool reference,
    bool prompt,
    mx::StreamOrDevice s) {
  const std::string op = "sparse_mla_decode";
  check_float(op, "q", q);
  if (q.ndim() != 4 || q.shape(2) < 1 || rank < 1 || q.shape(3) < rank) {
    invalid(
        op,
        "q must be [batch, queries, heads, rank + rope], rank ",
        rank,
        ", but has shape ",
        shape_of(q),
        ".");
  }
  const int batch = q.shape(0), queries = q.shape(1);
  // Heads are padded to whole vectors.
  check_count(op, "the values of a query", {q.shape(2) + 15ll, q.shape(3)});
  const int rope = q.shape(3) - rank;
  const RowLayout layout =
      check_rows(op, "latents", latents, batch, rank, rope);
  check_keys(op, latents.shape(1), queries);
  check_ropes(op, layout, latents, ropes);
  std::vector<mx::array> inputs = {
      mx::contiguous(q, false, s), first_keys(op, start, batch, s), latents};
  if (ropes) {
    inputs.push_back(*ropes);
  }
  if (selected) {
    const int k = selected->ndim() == 3 ? selected->shape(2) : 1;
    inputs.push_back(
        int_array(op, "selected", *selected, {batch, queries, k}, s));
  }
  auto primitive = place(
      std::make_shared<SparseMlaDecode>(
          mx::to_stream(s),
          reference,
          prompt,
          layout,
          scale,
          ropes.has_value(),
          selected.has_value()));
  return mx::array(
      {batch, queries, q.shape(2), rank},
      mx::float32,
      primitive,
      std::move(inputs));
}

}  // namespace glm_fused
