// The long-context ops share these checks.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "row_layout.h"

namespace glm_fused {

// Returns the layout of cached rows [b, t, width] with `rank` values and `rope`
// RoPE values. A packed row carries its RoPE part, a floating one does not.
inline RowLayout check_rows(
    const std::string& op,
    const std::string& name,
    const mx::array& rows,
    int batch,
    int rank,
    int rope) {
  RowFormat format = RowFormat::floating;
  if (rows.dtype() == mx::uint8) {
    format = RowFormat::fp8;
  } else if (rows.dtype() == mx::int8) {
    format = RowFormat::int8;
  } else if (
      rows.dtype() != mx::float32 && rows.dtype() != mx::float16 &&
      rows.dtype() != mx::bfloat16) {
    invalid(
        op,
        name,
        " must be float32, float16, bfloat16, uint8 (e4m3 rows) or int8 but "
        "is ",
        rows.dtype(),
        ".");
  }
  const int64_t width = format == RowFormat::floating
      ? rank
      : static_cast<int64_t>(packed_row_bytes(format, rank, rope));
  if (rows.ndim() != 3 || rows.shape(0) != batch || rows.shape(2) != width) {
    invalid(
        op,
        name,
        " must be [",
        batch,
        ", keys, ",
        width,
        "] but has shape ",
        shape_of(rows),
        ".");
  }
  return {format, rank, rope};
}

inline void check_keys(const std::string& op, int keys, int queries) {
  constexpr int kMaxKeys = 1 << 30;
  if (keys > kMaxKeys) {
    invalid(
        op,
        "the cache must hold at most ",
        kMaxKeys,
        " keys but has ",
        keys,
        ".");
  }
  if (keys < queries) {
    invalid(
        op,
        "the cache must hold the queries' own keys, at least ",
        queries,
        ", but has ",
        keys,
        ".");
  }
}

inline mx::array int_array(
    const std::string& op,
    const std::string& name,
    const mx::array& a,
    const mx::Shape& shape,
    mx::StreamOrDevice s) {
  if (a.dtype() != mx::int32 && a.dtype() != mx::uint32) {
    invalid(op, name, " must be int32 or uint32 but is ", a.dtype(), ".");
  }
  check_shape(op, name, a, shape);
  return mx::contiguous(mx::astype(a, mx::int32, s), false, s);
}

// Returns the first key of each sequence, 0 where there is no padding.
inline mx::array first_keys(
    const std::string& op,
    const std::optional<mx::array>& start,
    int batch,
    mx::StreamOrDevice s) {
  if (start) {
    return int_array(op, "start", *start, {batch}, s);
  }
  // A GPU would launch a kernel for mx::zeros.
  const std::vector<int32_t> zeros(batch);
  return mx::array(zeros.begin(), {batch}, mx::int32);
}

}  // namespace glm_fused
