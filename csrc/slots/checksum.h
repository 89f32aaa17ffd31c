// This checksum finds damaged and swapped files fast; it is no cryptographic
// hash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace glm_fused::slots {

// It sums eight lanes of 64-bit words, so that it keeps up with an SSD.
class Checksum {
 public:
  // All but the last call must add multiples of 64 bytes for the sum not to
  // depend on how the data are cut; the expert's parts are cut in one way only.
  void add(const std::byte* data, size_t bytes) {
    size_t at = 0;
    for (; at + kBlock <= bytes; at += kBlock) {
      add_block(data + at);
    }
    if (at < bytes) {
      std::byte last[kBlock] = {};
      std::memcpy(last, data + at, bytes - at);
      add_block(last);
    }
    total_ += bytes;
  }

  uint64_t value() const {
    uint64_t sum = total_;
    for (uint64_t lane : lanes_) {
      sum = (sum ^ lane ^ lane >> 31) * kFactor;
      sum = sum << 27 | sum >> 37;
    }
    return sum;
  }

 private:
  static constexpr size_t kBlock = 64;
  static constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;

  void add_block(const std::byte* data) {
    for (int i = 0; i < 8; i++) {
      uint64_t word;
      std::memcpy(&word, data + 8 * i, 8);
      const uint64_t mixed = (lanes_[i] ^ word) * kFactor;
      lanes_[i] = mixed ^ mixed >> 29;
    }
  }

  uint64_t lanes_[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  uint64_t total_ = 0;
};

}  // namespace glm_fused::slots
