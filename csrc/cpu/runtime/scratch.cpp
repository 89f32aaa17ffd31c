#include "cpu/runtime/scratch.h"

#include <atomic>
#include <cstdio>
#include <exception>
#include <map>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define GLM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GLM_ASAN 1
#endif
#endif

#ifdef GLM_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace glm_fused::cpu {

namespace {

#ifdef GLM_ASAN
// Spans lie apart, and touching what is between them is forbidden here: the
// sanitizer does not know the spans of a block that tasks share.
constexpr size_t kApart = 64;
void forbid(uintptr_t at, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(at), bytes);
}
#else
constexpr size_t kApart = 0;
void forbid(uintptr_t, size_t) {}
#endif

std::atomic<size_t> held{0}, most_held{0};  // bytes of all blocks

void count_block(size_t bytes) {
  const size_t now = held += bytes;
  size_t most = most_held;
  while (most < now && !most_held.compare_exchange_weak(most, now)) {
  }
}

}  // namespace

uintptr_t Scratch::next(size_t bytes) {
  const size_t lines = (bytes + kLine - 1) / kLine * kLine + kApart;
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
  if (block_ != 0) {
    forbid(at + bytes, lines - bytes);
  }
  return at;
}

Block scratch_block(mlx::core::Stream stream, int slot, size_t bytes) {
  struct Last {
    std::weak_ptr<std::byte> block;
    size_t size = 0;
  };
  // The last blocks of each stream that this thread enqueues on, by slot.
  thread_local std::map<std::pair<int, int>, Last> blocks;
  Last& last = blocks[{stream.index, slot}];
  if (last.size >= bytes && kApart == 0) {
    if (Block block = last.block.lock()) {
      return block;
    }
  }
  constexpr std::align_val_t line{64};
  const auto free = [bytes](std::byte* p) {
    ::operator delete(p, line);
    held -= bytes;
  };
  auto* memory = static_cast<std::byte*>(::operator new(bytes, line));
  count_block(bytes);
  Block block(memory, free);
  last = {block, bytes};
  return block;
}

size_t peak_scratch_bytes() {
  return most_held;
}

void reset_peak_scratch() {
  most_held = held.load();
}

}  // namespace glm_fused::cpu
