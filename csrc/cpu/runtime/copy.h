// Copies arrays of any strides.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/runtime/dispatch.h"

namespace glm_fused::cpu {

// Copies an array to another of the same shape and type.
class Copy {
 public:
  Copy(const mlx::core::array& from, mlx::core::array& to)
      : from_(from), to_(to) {}

  void run() const {
    copy(0, from_.data<std::byte>(), to_.data<std::byte>());
  }

 private:
  void copy(int axis, const std::byte* source, std::byte* target) const {
    const size_t item = from_.itemsize();
    const int ndim = static_cast<int>(from_.ndim());
    const auto stride = [&](const mlx::core::array& a) {
      return static_cast<std::ptrdiff_t>(a.strides(axis) * item);
    };
    if (axis == ndim ||
        (axis == ndim - 1 && from_.strides(axis) == 1 &&
         to_.strides(axis) == 1)) {
      const size_t count = axis == ndim ? 1 : from_.shape(axis);
      std::copy_n(source, count * item, target);
      return;
    }
    for (int i = 0; i < from_.shape(axis); i++) {
      copy(axis + 1, source + i * stride(from_), target + i * stride(to_));
    }
  }

  const mlx::core::array& from_;
  mlx::core::array& to_;
};

// Copies an array to another of the same shape and type, whose memory may be a
// part of a larger one's, for the node `owner`.
inline void copy(
    mlx::core::Primitive& owner,
    const mlx::core::array& from,
    const mlx::core::array& to) {
  const auto make = [](auto& in, auto& out, Scratch&, int) {
    return Copy(in[0], out[0]);
  };
  Arrays target = {to};
  dispatch(owner, {from}, target, make);
}

}  // namespace glm_fused::cpu
