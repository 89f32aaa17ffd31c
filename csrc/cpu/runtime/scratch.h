// Memory that a kernel needs besides its arrays. It is allocated when the
// kernel is enqueued, because a task cannot report an error (dispatch.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "mlx/stream.h"

namespace glm_fused::cpu {

// Several spans, such as one per thread, each in cache lines of its own.
template <class T>
class Shares {
 public:
  Shares() = default;
  Shares(T* first, size_t stride) : first_(first), stride_(stride) {}

  T* operator[](int worker) const {
    return first_ + worker * stride_;
  }

 private:
  T* first_ = nullptr;
  size_t stride_ = 0;
};

// Gives spans of a block, one after the other, on cache lines. Without a block
// it measures how much is taken, and the spans that it gives must not be
// touched.
class Scratch {
 public:
  Scratch() : size_(SIZE_MAX) {}
  Scratch(std::byte* block, size_t size)
      : block_(reinterpret_cast<uintptr_t>(block)), size_(size) {}

  template <class T>
  std::span<T> take(size_t count) {
    return {reinterpret_cast<T*>(next(count * sizeof(T))), count};
  }

  template <class T>
  Shares<T> take_each(int workers, size_t count) {
    constexpr size_t unit = kLine / sizeof(T);
    const size_t stride = (count + unit - 1) / unit * unit;
    return {take<T>(workers * stride).data(), stride};
  }

  size_t used() const {
    return used_;
  }

 private:
  static constexpr size_t kLine = 64;

  uintptr_t next(size_t bytes);

  uintptr_t block_ = 0;
  size_t size_, used_ = 0;
};

using Block = std::shared_ptr<std::byte>;

// Returns at least `bytes` on a cache line, for a task that is about to be
// enqueued on `stream`. A stream runs one task after the other, so those that
// wait there share a block, and need no more memory than one. Tasks that may
// run at once have different slots. Throws std::bad_alloc.
Block scratch_block(mlx::core::Stream stream, int slot, size_t bytes);

// Returns the most bytes that blocks have held at once, since the start or the
// last reset. MLX's own count has nothing of them.
size_t peak_scratch_bytes();
void reset_peak_scratch();

}  // namespace glm_fused::cpu
