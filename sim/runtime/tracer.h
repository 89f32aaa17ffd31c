// Watches every memory access of a traced launch (which has one worker).
//
// Two accesses race when at least one writes, not both are atomic, and no
// barrier of the right kind orders them. Within a threadgroup,
// threadgroup_barrier orders all threads and simdgroup_barrier those of a
// simdgroup, each for the memory that its flags name; other simdgroup
// functions order nothing. Threadgroups are never in order.
#pragma once

#include <cstdint>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "report.h"

namespace sim {

enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite, kAtomic };
inline bool reads(Access a) {
  return a != Access::kWrite && a != Access::kAtomicWrite;
}
inline bool writes(Access a) {
  return a != Access::kRead && a != Access::kAtomicRead;
}
inline bool atomic(Access a) {
  return a > Access::kWrite;
}

class Tracer {
 public:
  Tracer(const Memory& memory, sim_report& report, uintptr_t library_base);
  ~Tracer();
  Tracer(const Tracer&) = delete;
  Tracer& operator=(const Tracer&) = delete;

  void begin_threadgroup();
  void access(
      Worker& worker,
      uint64_t address,
      uint64_t size,
      Access access,
      uintptr_t pc,
      uint64_t alignment);
  std::vector<sim_traffic> traffic() const;

 private:
  // An access as a byte remembers it. `group` is 1 + the threadgroup's id, and
  // 0 where there was none.
  struct Past {
    uint32_t group, thread, group_epoch, simd_epoch, pc;
    bool atomic;
  };
  // The last write, and two reads, by different simdgroups where several read:
  // no write can be in order with both and race with a third.
  struct Byte {
    Past write, reads[2];
  };
  // A buffer's bytes, in zeroed pages that cost nothing until they are touched.
  struct Shadow {
    const Buffer* buffer;
    uint8_t* touched;  // per byte: 1 read, 2 written
    uint64_t read, written;
  };
  struct Span {
    uint64_t start, size;
    Byte* bytes;
  };
  struct Where {
    int32_t buffer;
    int64_t offset;
  };

  const Memory& memory_;
  sim_report& report_;
  uintptr_t library_base_;
  std::vector<Shadow> shadows_;
  std::vector<Span> spans_;  // writable memory, overlapping buffers merged
  Byte* group_bytes_;
  std::vector<void*> maps_;
  std::vector<uint64_t> map_sizes_;

  void* zeroed(uint64_t size);
  void add_span(uint64_t start, uint64_t size);
  void check_alignment(Worker&, uint64_t, uint64_t alignment, uint32_t pc);
  void count(uint64_t address, uint64_t size, Access access);
  Byte* device_bytes(uint64_t address, uint64_t size);
  void device_access(Worker&, uint64_t, uint64_t, Access, uint32_t pc);
  void group_access(Worker&, uint64_t, uint64_t, Access, uint32_t pc);
  const Past* conflict(const Byte&, const Past& now, Access access) const;
  void remember(Byte& byte, const Past& now, Access access);
  void report(
      Worker& worker,
      sim_finding_kind kind,
      const Where& where,
      uint32_t pc,
      const std::string& text,
      const Past* other = nullptr);
};

}  // namespace sim
