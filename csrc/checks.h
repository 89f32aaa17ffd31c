// Argument checks shared by the ops: each throws std::invalid_argument.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace glm_fused {

template <class... Parts>
[[noreturn]] void invalid(const std::string& op, const Parts&... parts) {
  std::ostringstream text;
  text << "[" << op << "] ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const mx::array& a) {
  std::ostringstream text;
  text << a.shape();
  return text.str();
}

inline void check_float(
    const std::string& op,
    const std::string& name,
    const mx::array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::float16 &&
      a.dtype() != mx::bfloat16) {
    invalid(
        op,
        name,
        " must be float32, float16 or bfloat16 but is ",
        a.dtype(),
        ".");
  }
}

inline void check_shape(
    const std::string& op,
    const std::string& name,
    const mx::array& a,
    const mx::Shape& expected) {
  if (a.shape() != expected) {
    std::ostringstream want;
    want << expected;
    invalid(
        op,
        name,
        " must have shape ",
        want.str(),
        " but has ",
        shape_of(a),
        ".");
  }
}

// Checks that every slot is from 0 to count - 1. The slots must be evaluated
// and contiguous.
void check_slots(const std::string& op, const mx::array& slots, int count);

// Checks that the product of `factors`, which are not negative, fits an int, in
// which counts are kept. `what` says what is counted.
inline void check_count(
    const std::string& op,
    const std::string& what,
    std::initializer_list<int64_t> factors) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (factor > 0 && product > most / factor) {
      invalid(op, what, " are more than ", most, ".");
    }
    product *= factor;
  }
}

}  // namespace glm_fused
