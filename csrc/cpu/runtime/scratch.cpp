#include "cpu/runtime/scratch.h"

#include <cstdio>
#include <exception>
#include <new>
#include <unordered_map>

namespace glm_fused::cpu {

uintptr_t Scratch::next(size_t bytes) {
  const size_t lines = (bytes + kLine - 1) / kLine * kLine;
  if (lines > size_ - used_) {
    std::fprintf(
        stderr,
        "glm_fused: a kernel takes %zu bytes of scratch memory, of which %zu "
        "of %zu are left.\n",
        lines,
        size_ - used_,
        size_);
    std::terminate();
  }
  const uintptr_t at = block_ + used_;
  used_ += lines;
  return at;
}

Block scratch_block(mlx::core::Stream stream, size_t bytes) {
  struct Last {
    std::weak_ptr<std::byte> block;
    size_t size = 0;
  };
  // Of the streams that this thread enqueues on.
  thread_local std::unordered_map<int, Last> blocks;
  Last& last = blocks[stream.index];
  if (last.size >= bytes) {
    if (Block block = last.block.lock()) {
      return block;
    }
  }
  constexpr std::align_val_t line{64};
  const auto free = [line](std::byte* p) { ::operator delete(p, line); };
  Block block(static_cast<std::byte*>(::operator new(bytes, line)), free);
  last = {block, bytes};
  return block;
}

}  // namespace glm_fused::cpu
