#include "threadgroup_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace sim {

ThreadgroupMemory::ThreadgroupMemory() {
  void* map = mmap(
      nullptr,
      kCapacity,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (map == MAP_FAILED) {
    throw std::bad_alloc();
  }
  base_ = static_cast<uint8_t*>(map);
}

ThreadgroupMemory::~ThreadgroupMemory() {
  munmap(base_, kCapacity);
}

uint8_t* ThreadgroupMemory::variable(uint32_t id, uint64_t size) {
  if (id >= variables_.size()) {
    variables_.resize(id + 1);
  }
  Variable& v = variables_[id];
  if (!v.data) {
    uint64_t start = (top_ + 63) & ~63ull;
    if (start + size + 64 > kCapacity || bytes_ + size > kLimit) {
      return nullptr;
    }
    v = {base_ + start, size};
    top_ = start + size + 64;  // leaves a gap, in which the tracer sees strays
    bytes_ += size;
    memset(v.data, 0xff, size);
  }
  return v.data;
}

void ThreadgroupMemory::poison() {
  memset(base_, 0xff, top_);
}

const ThreadgroupMemory::Variable* ThreadgroupMemory::find(
    uint64_t address,
    uint64_t size) const {
  for (const Variable& v : variables_) {
    uint64_t offset = address - uint64_t(v.data);
    if (v.data && offset < v.size && offset + size <= v.size) {
      return &v;
    }
  }
  return nullptr;
}

}  // namespace sim
