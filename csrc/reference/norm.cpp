#include <cmath>
#include <functional>
#include <vector>

#include "reference/reference.h"
#include "rounding.h"
#include "view.h"

namespace glm_fused::reference {

namespace mx = mlx::core;

namespace {

float value_of(const mx::array& a, int64_t at) {
  if (a.dtype() == mx::float32) {
    return a.data<float>()[at];
  }
  const uint16_t code = a.data<uint16_t>()[at];
  return a.dtype() == mx::float16 ? from_float16(code) : from_bfloat16(code);
}

std::vector<float> row_of(const mx::array& x, const ViewParams& view, int row) {
  const int64_t first = row_offset(view, row);
  std::vector<float> values(view.columns);
  for (int i = 0; i < view.columns; i++) {
    values[i] = value_of(x, first + i * view.column_stride);
  }
  return values;
}

// Sums a row in the order of a dense dot product: four columns a lane of each
// block of 128, then a tree over the lanes. `add` gives a lane's next sum.
float sum_over(
    const std::vector<float>& x,
    const std::function<float(float sum, float value)>& add) {
  constexpr int kLanes = 32, kValues = 4;
  float sums[kLanes] = {};
  for (size_t i = 0; i < x.size(); i++) {
    float& sum = sums[i / kValues % kLanes];
    sum = add(sum, x[i]);
  }
  for (int step = kLanes / 2; step >= 1; step /= 2) {
    for (int lane = 0; lane < step; lane++) {
      sums[lane] = sums[lane] + sums[lane + step];
    }
  }
  return sums[0];
}

}  // namespace

void norm(
    const mx::array& x,
    const mx::array& weight,
    const mx::array* bias,
    float eps,
    mx::array& y) {
  const ViewParams view = view_of(x);
  const FloatType type = float_type_of(x.dtype());
  const int n = view.columns;
  for (int row = 0; row < static_cast<int>(y.size() / n); row++) {
    std::vector<float> values = row_of(x, view, row);
    if (bias != nullptr) {
      const float sum =
          sum_over(values, [](float sum, float v) { return sum + v; });
      const float mean = sum / static_cast<float>(n);
      for (float& value : values) {
        value = value - mean;
      }
    }
    const float squares = sum_over(
        values, [](float sum, float v) { return std::fma(v, v, sum); });
    const float mean = squares / static_cast<float>(n);
    const float root = std::sqrt(mean + eps);
    const float inverse = 1.0f / root;
    for (int i = 0; i < n; i++) {
      values[i] = round_to(values[i] * inverse, type);
      values[i] = round_to(values[i] * value_of(weight, i), type);
      if (bias != nullptr) {
        values[i] = values[i] + value_of(*bias, i);
      }
    }
    cpu::store_row(y, static_cast<size_t>(row) * n, values.data(), n);
  }
}

void rotate(
    const mx::array& x,
    const mx::array& cosines,
    const mx::array& sines,
    bool interleaved,
    mx::array& y) {
  const ViewParams view = view_of(x);
  const int n = view.columns, heads = view.heads, length = view.length;
  const int pairs = cosines.shape(3);
  for (int row = 0; row < static_cast<int>(y.size() / n); row++) {
    std::vector<float> values = row_of(x, view, row);
    const int angle = row / length / heads * length + row % length;
    const auto cosine = row_of(cosines, view_of(cosines), angle);
    const auto sine = row_of(sines, view_of(sines), angle);
    for (int i = 0; i < pairs; i++) {
      float& a = values[interleaved ? 2 * i : i];
      float& b = values[interleaved ? 2 * i + 1 : pairs + i];
      const float a_cosine = a * cosine[i], b_cosine = b * cosine[i];
      const float a_sine = a * sine[i], b_sine = b * sine[i];
      a = a_cosine - b_sine;
      b = b_cosine + a_sine;
    }
    cpu::store_row(y, static_cast<size_t>(row) * n, values.data(), n);
  }
}

}  // namespace glm_fused::reference
