// The threadgroup memory of one worker, laid out as variables are first used.
#pragma once

#include <cstdint>
#include <vector>

namespace sim {

class ThreadgroupMemory {
 public:
  ThreadgroupMemory();
  ~ThreadgroupMemory();
  ThreadgroupMemory(const ThreadgroupMemory&) = delete;
  ThreadgroupMemory& operator=(const ThreadgroupMemory&) = delete;

  struct Variable {
    uint8_t* data = nullptr;
    uint64_t size = 0;
  };
  // Returns variable `id`, made on its first use; null when memory runs out.
  uint8_t* variable(uint32_t id, uint64_t size);
  void poison();  // sets all to NaN in every float type, for each threadgroup
  bool contains(uint64_t address) const {
    return address - uint64_t(base_) < kCapacity;
  }
  uint64_t offset(uint64_t address) const {
    return address - uint64_t(base_);
  }
  const Variable* find(uint64_t address, uint64_t size) const;
  uint64_t bytes() const {
    return bytes_;
  }
  static constexpr uint64_t kCapacity = 128 * 1024;
  static constexpr uint64_t kLimit = 32 * 1024;  // Apple's, for one threadgroup

 private:
  uint8_t* base_;
  uint64_t top_ = 0, bytes_ = 0;
  std::vector<Variable> variables_;
};

}  // namespace sim
