#include "ops/differentiate.h"

#include <algorithm>

namespace glm_fused {

Arrays differentiate(
    const Chain& chain,
    const Arrays& primals,
    const mx::array& cotangent,
    const std::vector<int>& argnums) {
  std::vector<int> floats;
  Arrays chosen;
  for (int i : argnums) {
    if (mx::issubdtype(primals[i].dtype(), mx::floating)) {
      floats.push_back(i);
      chosen.push_back(primals[i]);
    }
  }
  auto given = [&](const Arrays& values) {
    Arrays all = primals;
    for (size_t j = 0; j < floats.size(); j++) {
      all[floats[j]] = values[j];
    }
    return Arrays{chain(all)};
  };
  Arrays grads;
  if (!chosen.empty()) {
    grads = mx::vjp(given, chosen, {cotangent}).second;
  }
  Arrays result;
  for (int i : argnums) {
    const auto found = std::find(floats.begin(), floats.end(), i);
    result.push_back(
        found == floats.end() ? mx::zeros_like(primals[i])
                              : grads[found - floats.begin()]);
  }
  return result;
}

mx::array as_float32(const mx::array& a, const mx::Stream& s) {
  return mx::astype(a, mx::float32, s);
}

}  // namespace glm_fused
