// What every format's header describes twice: the reference's decode here, in
// plain loops, and the CPU kernels' (CpuDecode, cpu/dot/lanes.h).
#pragma once

#include <cmath>
#include <concepts>
#include <cstring>
#include <string>

#include "formats/format.h"
#include "rounding.h"

namespace glm_fused {

// A row of a weight, made of the addresses of that row in each plane. Lane l
// of a simdgroup owns `values` consecutive columns of each block of 32 lanes,
// from `column` on; `add` adds their products with x (at that column) to the
// lane's result, one rounding a step, in the order that is the format's
// definition. `values` is smaller than usual where the row ends.
template <class Row>
concept RowDecode = requires(
    const Row row,
    const Format& format,
    const uint8_t* const* planes,
    const float* x,
    int column,
    int values,
    bool fast_order,
    float& result) {
  Row(format, planes);
  { Row::values(format, fast_order) } -> std::same_as<int>;
  { row.add(x, column, values, result) } -> std::same_as<void>;
  // The instance of metal/formats/<family>.h, given the shader's name of the
  // type of floats.
  {
    Row::shader(format, std::string(), fast_order)
  } -> std::same_as<std::string>;
};

// The reference's decode of a family; each header defines its own.
template <Family family>
struct RowOf;

inline float read_float(const uint8_t* p, size_t index, FloatType type) {
  if (type == FloatType::float32) {
    float f;
    memcpy(&f, p + 4 * index, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, p + 2 * index, 2);
  return type == FloatType::float16 ? from_float16(h) : from_bfloat16(h);
}

// Four products, contracted as clang does: the first term's multiply is fused
// with the second's product, the later ones with the running sum.
inline float four(const float* x, const float* w) {
  const float t = std::fma(x[0], w[0], x[1] * w[1]);
  return std::fma(x[3], w[3], std::fma(x[2], w[2], t));
}

}  // namespace glm_fused
