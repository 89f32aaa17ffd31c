// The memory that a launch runs on: copies of the caller's buffers whose ends
// meet guard pages, so that a stray access faults where it can be named.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "executor.h"

namespace sim {

constexpr uint64_t kPage = 4096;

struct Buffer {
  int32_t index;
  bool writable;
  uint8_t* data;    // where the kernel finds it
  uint8_t* source;  // the caller's
  uint64_t size;
  uint64_t phase;
};

class Memory {
 public:
  // `traced` opens the gaps between buffers: the tracer reports accesses there
  // and the kernel goes on.
  Memory(const sim_kernel& kernel, const sim_dispatch& dispatch, bool traced);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Returns the address of each buffer index, as entry points take them.
  const std::vector<uint64_t>& table() const {
    return addresses_;
  }
  const std::vector<Buffer>& buffers() const {
    return buffers_;
  }
  bool contains(uint64_t address) const {
    return address - base_ < size_;
  }
  // Returns the buffer nearest to an address of this memory.
  const Buffer* nearest(uint64_t address) const;
  // Says what an access at `address` did wrong.
  std::string describe(uint64_t address) const;
  // Copies results to the caller; returns a description of what was overwritten
  // between a buffer's end and its guard page, or "".
  std::string copy_back();

 private:
  // Buffers that overlap share one copy.
  struct Region {
    uint8_t* source;
    uint8_t* copy;
    uint64_t size;
    uint64_t phase;
    bool writable;
    uint64_t slack;  // bytes between the end and the guard page
  };

  std::vector<uint64_t> addresses_;
  std::vector<Buffer> buffers_;
  std::vector<Region> regions_;
  uint64_t base_ = 0, size_ = 0;
  bool in_place_;

  void bind(const sim_kernel& kernel, const sim_dispatch& dispatch);
  void find_regions();
  void map(bool traced);
  void place_unbound(const sim_kernel& kernel);
};

}  // namespace sim
