// Scratch memory whose vectors never straddle a cache line.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace glm_fused::cpu {

class AlignedFloats {
 public:
  explicit AlignedFloats(size_t count)
      : data_(
            static_cast<float*>(
                ::operator new(count * sizeof(float), kAlignment))) {}
  float* get() const {
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const {
      ::operator delete(p, kAlignment);
    }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace glm_fused::cpu
