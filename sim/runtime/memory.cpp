#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sim {
namespace {

// This is address space only. A stray that is further off than this may hit
// another buffer.
constexpr uint64_t kGap = 64 << 20;
constexpr uint64_t kIndices = 64;
constexpr int kFill = 0xef;  // fills from a buffer's end to its guard page

uint64_t pages(uint64_t size) {
  return (size + kPage - 1) / kPage * kPage;
}

// Returns the room for a region: its bytes, and up to 15 for alignment.
uint64_t room(uint64_t size) {
  return pages(size + 16);
}

std::string bytes_text(uint64_t n) {
  return std::to_string(n) + " bytes";
}

}  // namespace

Memory::Memory(
    const sim_kernel& kernel,
    const sim_dispatch& dispatch,
    bool traced)
    : in_place_(dispatch.in_place) {
  bind(kernel, dispatch);
  find_regions();
  map(traced);
  for (Buffer& b : buffers_) {
    for (const Region& r : regions_) {
      uint64_t offset = b.source - r.source;
      if (b.source >= r.source && offset < std::max<uint64_t>(r.size, 1)) {
        b.data = r.copy + offset;
      }
    }
  }
  place_unbound(kernel);
  for (const Buffer& b : buffers_) {
    addresses_[b.index] = uint64_t(b.data);
  }
}

Memory::~Memory() {
  munmap(reinterpret_cast<void*>(base_), size_);
}

void Memory::bind(const sim_kernel& kernel, const sim_dispatch& dispatch) {
  for (uint32_t i = 0; i < dispatch.buffer_count; i++) {
    const sim_buffer& b = dispatch.buffers[i];
    if (b.index < 0 || b.index >= int32_t(kIndices)) {
      throw std::invalid_argument(
          "buffer index " + std::to_string(b.index) + " is not in 0..63");
    }
    bool writable = false;
    for (uint32_t k = 0; k < kernel.argument_count; k++) {
      const sim_argument& a = kernel.arguments[k];
      writable |= a.kind == SIM_BUFFER && a.index == b.index && a.writable;
    }
    auto* source = static_cast<uint8_t*>(b.data);
    buffers_.push_back(
        {b.index, writable, source, source, b.size, b.phase % 16});
  }
}

void Memory::find_regions() {
  for (const Buffer& b : buffers_) {
    regions_.push_back({b.source, b.source, b.size, b.phase, b.writable, 0});
  }
  std::sort(regions_.begin(), regions_.end(), [](auto& a, auto& b) {
    return a.source < b.source;
  });
  std::vector<Region> merged;
  for (const Region& r : regions_) {
    Region* last = merged.empty() ? nullptr : &merged.back();
    if (last && r.source < last->source + last->size) {
      uint64_t end = r.source - last->source + r.size;
      last->size = std::max(last->size, end);
      last->writable |= r.writable;
    } else {
      merged.push_back(r);
    }
  }
  regions_ = std::move(merged);
}

void Memory::map(bool traced) {
  // Before the buffers there is one page of zeroes for references that are not
  // bound, then one inaccessible page for each buffer index.
  size_ = (1 + kIndices) * kPage + kGap;
  for (const Region& r : regions_) {
    size_ += in_place_ ? 0 : room(r.size) + kGap;
  }
  void* map = mmap(
      nullptr,
      size_,
      PROT_NONE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (map == MAP_FAILED) {
    throw std::runtime_error("cannot map " + bytes_text(size_));
  }
  base_ = uint64_t(map);
  auto* at = static_cast<uint8_t*>(map);
  mprotect(at, kPage, PROT_READ);
  if (in_place_) {
    return;
  }
  at += (1 + kIndices) * kPage;
  if (traced) {
    mprotect(at, base_ + size_ - uint64_t(at), PROT_READ | PROT_WRITE);
  }
  at += kGap;
  for (Region& r : regions_) {
    uint8_t* end = at + room(r.size);
    mprotect(at, end - at, PROT_READ | PROT_WRITE);
    // The copy is aligned as the caller says, and else as near to the guard
    // page as can be.
    r.copy = end - r.size;
    r.copy -= (uint64_t(r.copy) - r.phase) % 16;
    r.slack = end - (r.copy + r.size);
    memcpy(r.copy, r.source, r.size);
    memset(r.copy + r.size, kFill, r.slack);
    if (!r.writable && !traced) {
      mprotect(at, end - at, PROT_READ);
    }
    at = end + kGap;
  }
}

void Memory::place_unbound(const sim_kernel& kernel) {
  addresses_.resize(kIndices);
  for (uint64_t i = 0; i < kIndices; i++) {
    addresses_[i] = base_ + (1 + i) * kPage;
  }
  for (uint32_t k = 0; k < kernel.argument_count; k++) {
    const sim_argument& a = kernel.arguments[k];
    if (a.kind == SIM_BUFFER && a.reference) {
      addresses_[a.index] = base_;
    }
  }
}

const Buffer* Memory::nearest(uint64_t address) const {
  const Buffer* best = nullptr;
  uint64_t best_distance = ~0ull;
  for (const Buffer& b : buffers_) {
    uint64_t start = uint64_t(b.data), end = start + b.size;
    uint64_t distance = address < start ? start - address
        : address >= end                ? address - end + 1
                                        : 0;
    if (distance < best_distance) {
      best = &b;
      best_distance = distance;
    }
  }
  return best;
}

std::string Memory::describe(uint64_t address) const {
  uint64_t place = (address - base_) / kPage;
  if (contains(address) && place >= 1 && place <= kIndices) {
    return "buffer " + std::to_string(place - 1) + " is not bound";
  }
  const Buffer* b = contains(address) ? nearest(address) : nullptr;
  if (!b) {
    return "no buffer there";
  }
  int64_t offset = address - uint64_t(b->data);
  std::string name =
      "buffer " + std::to_string(b->index) + " (" + bytes_text(b->size) + ")";
  if (offset >= 0 && uint64_t(offset) < b->size) {
    return "write to read-only " + name + ", byte " + std::to_string(offset);
  }
  return "byte " + std::to_string(offset) + " of " + name;
}

std::string Memory::copy_back() {
  std::string problem;
  for (const Region& r : regions_) {
    if (!r.writable || in_place_) {
      continue;
    }
    memcpy(r.source, r.copy, r.size);
    for (uint64_t i = 0; i < r.slack && problem.empty(); i++) {
      if (r.copy[r.size + i] != kFill) {
        problem = describe(uint64_t(r.copy) + r.size + i) + " was written";
      }
    }
  }
  return problem;
}

}  // namespace sim
