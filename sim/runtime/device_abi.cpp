// Compiled shaders call these functions: those of msl/runtime.h, and the
// callbacks that -fsanitize=thread puts before every memory access of a traced
// shader.

#include <atomic>
#include <cstring>

#include "fiber.h"
#include "tracer.h"

using sim::Access;
using sim::Worker;

namespace {

void trace(
    const void* address,
    uint64_t size,
    Access access,
    void* pc,
    uint64_t alignment = 1) {
  Worker* worker = Worker::running();
  if (worker && worker->launch().tracer) {
    worker->launch().tracer->access(
        *worker, uint64_t(address), size, access, uintptr_t(pc), alignment);
  }
}

enum Op {
  kLoad,
  kStore,
  kExchange,
  kAdd,
  kSub,
  kMax,
  kMin,
  kAnd,
  kOr,
  kXor,
};
enum Type { kBool, kInt, kUint, kUlong, kFloat };

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T bitwise(uint32_t op, T a, T b) {
  return op == kAnd ? a & b : op == kOr ? a | b : a ^ b;
}
template <>
float bitwise(uint32_t, float a, float) {
  return a;
}

template <typename T>
T combine(uint32_t op, T a, T b) {
  switch (op) {
    case kStore:
    case kExchange:
      return b;
    case kAdd:
      return a + b;
    case kSub:
      return a - b;
    case kMax:
      return a < b ? b : a;
    case kMin:
      return b < a ? b : a;
    default:
      return bitwise(op, a, b);
  }
}

template <typename T>
uint64_t apply(uint32_t op, uint64_t address, uint64_t bits) {
  std::atomic_ref<T> object(*reinterpret_cast<T*>(address));
  T old = object.load(std::memory_order_relaxed);
  if (op != kLoad) {
    while (!object.compare_exchange_weak(
        old, combine(op, old, from_bits<T>(bits)), std::memory_order_relaxed)) {
    }
  }
  return to_bits(old);
}

template <typename T>
bool compare_exchange(uint64_t address, uint64_t* expected, uint64_t desired) {
  std::atomic_ref<T> object(*reinterpret_cast<T*>(address));
  T found = T(*expected);
  bool done = object.compare_exchange_strong(found, T(desired));
  *expected = found;
  return done;
}

}  // namespace

extern "C" {

uint32_t sim_rt_lane() {
  return Worker::running()->thread().position.lane;
}

sim::Exchange* sim_rt_exchange(
    uint32_t op,
    const void* value,
    uint32_t size,
    const char* file,
    uint32_t line) {
  return Worker::running()->exchange({op, size, line, file}, value);
}

void sim_rt_barrier(uint32_t flags, const char* file, uint32_t line) {
  Worker::running()->barrier({0, 0, line, file}, flags);
}

void sim_rt_simd_barrier(uint32_t flags, const char* file, uint32_t line) {
  Worker::running()->simd_barrier({0, 0, line, file}, flags);
}

void* sim_rt_threadgroup(uint32_t id, uint64_t size) {
  return Worker::running()->threadgroup_variable(id, size);
}

uint64_t
sim_rt_atomic(uint32_t op, uint32_t type, uint64_t address, uint64_t value) {
  uint64_t size = type == kBool ? 1 : type == kUlong ? 8 : 4;
  trace(
      reinterpret_cast<void*>(address),
      size,
      op == kLoad        ? Access::kAtomicRead
          : op == kStore ? Access::kAtomicWrite
                         : Access::kAtomic,
      __builtin_return_address(0),
      size);
  switch (type) {
    case kBool:
      return apply<uint8_t>(op, address, value);
    case kInt:
      return apply<int32_t>(op, address, value);
    case kUint:
      return apply<uint32_t>(op, address, value);
    case kUlong:
      return apply<uint64_t>(op, address, value);
    default:
      return apply<float>(op, address, value);
  }
}

bool sim_rt_compare_exchange(
    uint32_t size,
    uint64_t address,
    uint64_t* expected,
    uint64_t desired) {
  trace(
      reinterpret_cast<void*>(address),
      size,
      Access::kAtomic,
      __builtin_return_address(0),
      size);
  return size == 1 ? compare_exchange<uint8_t>(address, expected, desired)
      : size == 4  ? compare_exchange<uint32_t>(address, expected, desired)
                   : compare_exchange<uint64_t>(address, expected, desired);
}

#define SIM_TRACE(name, size, kind, alignment)                          \
  void __tsan_##name(void* address) {                                   \
    trace(address, size, kind, __builtin_return_address(0), alignment); \
  }
// The compiler takes an access for aligned where its address is a multiple of
// its size, or of 8 where the size is larger.
#define SIM_TRACE_SIZE(size)                                        \
  SIM_TRACE(read##size, size, Access::kRead, size < 8 ? size : 8)   \
  SIM_TRACE(write##size, size, Access::kWrite, size < 8 ? size : 8) \
  SIM_TRACE(unaligned_read##size, size, Access::kRead, 1)           \
  SIM_TRACE(unaligned_write##size, size, Access::kWrite, 1)
SIM_TRACE_SIZE(1)
SIM_TRACE_SIZE(2)
SIM_TRACE_SIZE(4)
SIM_TRACE_SIZE(8)
SIM_TRACE_SIZE(16)
#undef SIM_TRACE
#undef SIM_TRACE_SIZE

void __tsan_read_range(void* address, uint64_t size) {
  trace(address, size, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, uint64_t size) {
  trace(address, size, Access::kWrite, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, uint64_t size) {
  trace(from, size, Access::kRead, __builtin_return_address(0));
  trace(to, size, Access::kWrite, __builtin_return_address(0));
  return memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, uint64_t size) {
  trace(from, size, Access::kRead, __builtin_return_address(0));
  trace(to, size, Access::kWrite, __builtin_return_address(0));
  return memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, uint64_t size) {
  trace(to, size, Access::kWrite, __builtin_return_address(0));
  return memset(to, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
