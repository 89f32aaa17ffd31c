#include "checks.h"
#include "primitives.h"

namespace glm_fused {

mx::array embed(
    const mx::array& tokens,
    const Weight& table,
    int hidden,
    mx::StreamOrDevice s) {
  const std::string op = "embed";
  if (tokens.dtype() != mx::int32 && tokens.dtype() != mx::uint32) {
    invalid(op, "tokens must be int32 or uint32 but are ", tokens.dtype(), ".");
  }
  check_planes(op, "table", table);
  const Format format = check_weight(op, "table", table, 2, hidden);
  if (format.family() != Family::affine && format.family() != Family::dense) {
    invalid(
        op,
        "table must be affine or dense but is ",
        std::string(table.spec->name),
        ".");
  }
  auto shape = tokens.shape();
  shape.push_back(hidden);
  std::vector<mx::array> inputs = {mx::contiguous(tokens, false, s)};
  append_arrays(inputs, table, s);
  return mx::array(
      shape,
      table.planes.back().dtype(),
      std::make_shared<Embed>(mx::to_stream(s), format),
      std::move(inputs));
}

}  // namespace glm_fused
