#include "cache_primitives.h"
#include "checks.h"
#include "ops/placement.h"

namespace glm_fused {

namespace {

void check_buffer(const std::string& op, const mx::array& buffer) {
  if (buffer.ndim() != 4 || buffer.shape(1) != 1) {
    invalid(
        op,
        "buffer must be [batch, 1, capacity, width] but has shape ",
        shape_of(buffer),
        ".");
  }
}

void check_place(
    const std::string& op,
    const mx::array& buffer,
    int count,
    int at) {
  if (at < 0 || at > buffer.shape(2) - count) {
    invalid(
        op,
        "at must be from 0 to ",
        buffer.shape(2) - count,
        ", for ",
        count,
        " rows and a capacity of ",
        buffer.shape(2),
        ", but is ",
        at,
        ".");
  }
}

void check_append(const mx::array& buffer, const mx::array& rows, int at) {
  const std::string op = "append_rows";
  check_buffer(op, buffer);
  const int batch = buffer.shape(0), width = buffer.shape(3);
  const int count = rows.ndim() == 4 ? rows.shape(2) : 1;
  check_shape(op, "rows", rows, {batch, 1, count, width});
  if (rows.dtype() != buffer.dtype()) {
    invalid(
        op, "rows must be ", buffer.dtype(), " but are ", rows.dtype(), ".");
  }
  check_place(op, buffer, count, at);
}

// Returns the layout of the rows that values and RoPE values are packed to.
RowLayout check_packed(
    const mx::array& buffer,
    const mx::array& values,
    const std::optional<mx::array>& ropes,
    int at) {
  const std::string op = "append_packed";
  check_buffer(op, buffer);
  if (buffer.dtype() != mx::uint8 && buffer.dtype() != mx::int8) {
    invalid(
        op,
        "buffer must be uint8 (e4m3 rows) or int8 but is ",
        buffer.dtype(),
        ".");
  }
  const auto check = [&](const char* name, const mx::array& a, int count) {
    check_float(op, name, a);
    const int width = a.ndim() == 4 ? a.shape(3) : 1;
    check_shape(op, name, a, {buffer.shape(0), 1, count, width});
    return width;
  };
  const int count = values.ndim() == 4 ? values.shape(2) : 1;
  const int rank = check("values", values, count);
  const RowLayout layout{
      buffer.dtype() == mx::uint8 ? RowFormat::fp8 : RowFormat::int8,
      rank,
      ropes ? check("ropes", *ropes, count) : 0};
  const auto bytes =
      static_cast<int64_t>(packed_row_bytes(layout.format, rank, layout.rope));
  if (rank < 1 || buffer.shape(3) != bytes) {
    invalid(
        op,
        "buffer must have rows of ",
        bytes,
        " bytes, for ",
        rank,
        " values and ",
        layout.rope,
        " RoPE values, but has shape ",
        shape_of(buffer),
        ".");
  }
  check_place(op, buffer, count, at);
  return layout;
}

// Returns the first `count` rows of an array that has been appended to.
mx::array first_rows(const mx::array& whole, int count, mx::Stream stream) {
  return mx::array(
      {whole.shape(0), count, whole.shape(3)},
      whole.dtype(),
      place(std::make_shared<FirstRows>(stream)),
      {whole});
}

}  // namespace

mx::array cache_buffer(
    int batch,
    int capacity,
    int width,
    mx::Dtype dtype,
    mx::StreamOrDevice s) {
  const mx::Shape shape = {batch, 1, capacity, width};
  constexpr int64_t kMostBytes = 1ll << 46;
  int64_t bytes = dtype.size();
  for (const int64_t size : shape) {
    if (size < 0 || (size > 0 && bytes > kMostBytes / size)) {
      invalid(
          "cache_buffer",
          "a buffer of shape ",
          shape,
          " cannot be given memory.");
    }
    bytes *= size;
  }
  return mx::array(
      shape, dtype, std::make_shared<CacheBuffer>(mx::to_stream(s)), {});
}

std::pair<mx::array, mx::array> append_rows(
    const mx::array& buffer,
    const mx::array& rows,
    int at,
    mx::StreamOrDevice s) {
  check_append(buffer, rows, at);
  const mx::Stream stream = mx::to_stream(s);
  const mx::array whole(
      buffer.shape(),
      buffer.dtype(),
      place(std::make_shared<AppendRows>(stream, at)),
      {buffer, rows});
  return {whole, first_rows(whole, at + rows.shape(2), stream)};
}

std::vector<mx::array> append_pair(
    const mx::array& buffer,
    const mx::array& rows,
    const mx::array& other_buffer,
    const mx::array& other_rows,
    int at,
    mx::StreamOrDevice s) {
  check_append(buffer, rows, at);
  check_append(other_buffer, other_rows, at);
  const mx::Shape expected = {
      rows.shape(0), 1, rows.shape(2), other_rows.shape(3)};
  check_shape("append_rows", "other_rows", other_rows, expected);
  if (other_rows.dtype() != rows.dtype()) {
    invalid(
        "append_rows",
        "other_rows must be ",
        rows.dtype(),
        " but are ",
        other_rows.dtype(),
        ".");
  }
  const mx::Stream stream = mx::to_stream(s);
  auto wholes = mx::array::make_arrays(
      {buffer.shape(), other_buffer.shape()},
      {buffer.dtype(), other_buffer.dtype()},
      place(std::make_shared<AppendRows>(stream, at)),
      {buffer, rows, other_buffer, other_rows});
  const int count = at + rows.shape(2);
  wholes.push_back(first_rows(wholes[0], count, stream));
  wholes.push_back(first_rows(wholes[1], count, stream));
  return wholes;
}

std::pair<mx::array, mx::array> append_packed(
    const mx::array& buffer,
    const mx::array& values,
    const std::optional<mx::array>& ropes,
    int at,
    mx::StreamOrDevice s) {
  const RowLayout layout = check_packed(buffer, values, ropes, at);
  const mx::Stream stream = mx::to_stream(s);
  std::vector<mx::array> inputs = {buffer, values};
  if (layout.rope > 0) {
    inputs.push_back(*ropes);
    if (values.dtype() != ropes->dtype()) {  // fp32 holds both exactly
      inputs[1] = mx::astype(values, mx::float32, s);
      inputs[2] = mx::astype(*ropes, mx::float32, s);
    }
  }
  const mx::array whole(
      buffer.shape(),
      buffer.dtype(),
      place(std::make_shared<AppendPacked>(stream, at, layout)),
      std::move(inputs));
  return {whole, first_rows(whole, at + values.shape(2), stream)};
}

}  // namespace glm_fused
