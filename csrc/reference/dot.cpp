#include <algorithm>

#include "formats/families.h"
#include "reference/reference.h"

namespace glm_fused::reference {

namespace {

constexpr int kLanes = 32;

template <RowDecode Row>
float walk(const cpu::Matrix& m, const Row& row, const float* x) {
  const int values = Row::values(m.format, m.fast_order);
  float result[kLanes] = {};
  for (int block = 0; block < m.k; block += kLanes * values) {
    for (int lane = 0; lane < kLanes; lane++) {
      const int column = block + lane * values;
      if (column < m.k) {
        const int used = std::min(values, m.k - column);
        row.add(x + column, column, used, result[lane]);
      }
    }
  }
  for (int step = kLanes / 2; step >= 1; step /= 2) {
    for (int lane = 0; lane < step; lane++) {
      result[lane] = result[lane] + result[lane + step];
    }
  }
  return result[0];
}

}  // namespace

float dot(const cpu::Matrix& m, int slot, int row, const float* x) {
  const uint8_t* planes[kMaxPlanes];
  m.locate(slot, row, planes);
  return with_family(m.format.family(), [&]<class Tag>(Tag) {
    return walk(m, typename RowOf<Tag::value>::type(m.format, planes), x);
  });
}

}  // namespace glm_fused::reference
