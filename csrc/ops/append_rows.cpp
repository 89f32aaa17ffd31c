#include "checks.h"
#include "ops/placement.h"
#include "primitives.h"

namespace glm_fused {

std::pair<mx::array, mx::array> append_rows(
    const mx::array& buffer,
    const mx::array& rows,
    int at,
    mx::StreamOrDevice s) {
  const std::string op = "append_rows";
  if (buffer.ndim() != 4 || buffer.shape(1) != 1) {
    invalid(
        op,
        "buffer must be [batch, 1, capacity, width] but has shape ",
        shape_of(buffer),
        ".");
  }
  const int batch = buffer.shape(0), width = buffer.shape(3);
  const int count = rows.ndim() == 4 ? rows.shape(2) : 1;
  check_shape(op, "rows", rows, {batch, 1, count, width});
  if (rows.dtype() != buffer.dtype()) {
    invalid(
        op, "rows must be ", buffer.dtype(), " but are ", rows.dtype(), ".");
  }
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
  const mx::Stream stream = mx::to_stream(s);
  const mx::array whole(
      buffer.shape(),
      buffer.dtype(),
      place(std::make_shared<AppendRows>(stream, at)),
      {buffer, rows});
  const mx::array first(
      {batch, at + count, width},
      buffer.dtype(),
      place(std::make_shared<FirstRows>(stream)),
      {whole});
  return {whole, first};
}

}  // namespace glm_fused
