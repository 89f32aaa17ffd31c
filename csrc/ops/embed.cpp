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
  const Family family = format.family();
  const bool floats = family == Family::affine || family == Family::dense;
  if (!floats && !is_gguf(family)) {
    invalid(
        op,
        "table must be affine, dense or GGUF's but is ",
        std::string(table.spec->name),
        ".");
  }
  auto shape = tokens.shape();
  shape.push_back(hidden);
  std::vector<mx::array> inputs = {mx::contiguous(tokens, false, s)};
  append_arrays(inputs, table, s);
  return mx::array(
      shape,
      floats ? table.planes.back().dtype() : mx::float32,
      std::make_shared<Embed>(mx::to_stream(s), format),
      std::move(inputs));
}

mx::array gguf_values(const Weight& w) {
  const std::string op = "gguf_values";
  check_planes(op, "w", w);
  const FormatSpec& spec = *w.spec;
  if (!is_gguf(spec.family)) {
    invalid(op, "w must be GGUF's but is ", std::string(spec.name), ".");
  }
  mx::Shape shape = w.rows().shape();
  const int bytes = shape.back(), k = bytes / spec.planes[0].count * spec.block;
  shape.back() = k;
  const int rows =
      static_cast<int>(w.rows().size() / static_cast<size_t>(bytes));
  const Weight flat{
      {mx::reshape(w.rows(), {rows, bytes}, mx::Device::cpu)}, w.spec};
  const mx::array each = mx::arange(rows, mx::int32, mx::Device::cpu);
  return mx::reshape(
      embed(each, flat, k, mx::Device::cpu), shape, mx::Device::cpu);
}

}  // namespace glm_fused
