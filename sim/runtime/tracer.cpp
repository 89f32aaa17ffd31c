#include "tracer.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace sim {
namespace {

constexpr uint32_t kSimdWidth = 32;

template <typename Past>
bool ordered(const Past& before, const Past& now) {
  if (before.group != now.group) {
    return false;
  }
  return before.thread == now.thread || before.group_epoch < now.group_epoch ||
      (before.thread / kSimdWidth == now.thread / kSimdWidth &&
       before.simd_epoch < now.simd_epoch);
}

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
      return "read of ";
    case Access::kWrite:
      return "write of ";
    default:
      return "atomic access to ";
  }
}

}  // namespace

Tracer::Tracer(const Memory& memory, sim_report& report, uintptr_t library_base)
    : memory_(memory), report_(report), library_base_(library_base) {
  for (const Buffer& b : memory.buffers()) {
    auto* touched = static_cast<uint8_t*>(zeroed(b.size));
    shadows_.push_back({&b, touched, 0, 0});
    if (b.writable) {
      add_span(uint64_t(b.data), b.size);
    }
  }
  for (Span& s : spans_) {
    s.bytes = static_cast<Byte*>(zeroed(s.size * sizeof(Byte)));
  }
  group_bytes_ =
      static_cast<Byte*>(zeroed(ThreadgroupMemory::kCapacity * sizeof(Byte)));
}

Tracer::~Tracer() {
  for (size_t i = 0; i < maps_.size(); i++) {
    munmap(maps_[i], map_sizes_[i]);
  }
}

void* Tracer::zeroed(uint64_t size) {
  size = std::max<uint64_t>(size, 1);
  void* map = mmap(
      nullptr,
      size,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (map == MAP_FAILED) {
    throw std::bad_alloc();
  }
  maps_.push_back(map);
  map_sizes_.push_back(size);
  return map;
}

void Tracer::add_span(uint64_t start, uint64_t size) {
  uint64_t end = start + size;
  for (size_t i = 0; i < spans_.size();) {
    Span& s = spans_[i];
    if (s.start < end && start < s.start + s.size) {
      start = std::min(start, s.start);
      end = std::max(end, s.start + s.size);
      spans_.erase(spans_.begin() + i);
      i = 0;
    } else {
      i++;
    }
  }
  spans_.push_back({start, end - start, nullptr});
}

void Tracer::begin_threadgroup() {
  // Threadgroup memory starts anew. Dropping the pages zeroes them.
  madvise(
      group_bytes_, ThreadgroupMemory::kCapacity * sizeof(Byte), MADV_DONTNEED);
}

void Tracer::access(
    Worker& worker,
    uint64_t address,
    uint64_t size,
    Access access,
    uintptr_t pc,
    uint64_t alignment) {
  if (worker.on_stack(address)) {
    return;
  }
  auto place = uint32_t(pc - library_base_);
  if (address % alignment) {
    check_alignment(worker, address, alignment, place);
  }
  if (worker.memory().contains(address)) {
    group_access(worker, address, size, access, place);
  } else if (memory_.contains(address)) {
    device_access(worker, address, size, access, place);
  } else if (!worker.owns(address)) {
    worker.abandon("stray access: no buffer there", pc);
  }
}

void Tracer::check_alignment(
    Worker& worker,
    uint64_t address,
    uint64_t alignment,
    uint32_t pc) {
  Where where{SIM_THREADGROUP_MEMORY, int64_t(address % alignment)};
  if (!worker.memory().contains(address)) {
    const Buffer* b =
        memory_.contains(address) ? memory_.nearest(address) : nullptr;
    if (!b) {
      return;
    }
    where = {b->index, int64_t(address - uint64_t(b->data))};
  }
  report(
      worker,
      SIM_MISALIGNED,
      where,
      pc,
      "access to " +
          (where.buffer == SIM_THREADGROUP_MEMORY
               ? "threadgroup memory"
               : "byte " + std::to_string(where.offset) + " of buffer " +
                   std::to_string(where.buffer)) +
          ", whose address is no multiple of " + std::to_string(alignment));
}

void Tracer::count(uint64_t address, uint64_t size, Access access) {
  for (Shadow& s : shadows_) {
    uint64_t offset = address - uint64_t(s.buffer->data);
    if (offset >= s.buffer->size || (writes(access) && !s.buffer->writable)) {
      continue;
    }
    s.read += reads(access) ? size : 0;
    s.written += writes(access) ? size : 0;
    for (uint64_t i = offset; i < std::min(offset + size, s.buffer->size);
         i++) {
      s.touched[i] |= (reads(access) ? 1 : 0) | (writes(access) ? 2 : 0);
    }
    return;
  }
}

Tracer::Byte* Tracer::device_bytes(uint64_t address, uint64_t size) {
  for (const Span& s : spans_) {
    uint64_t offset = address - s.start;
    if (offset < s.size && size <= s.size - offset) {
      return s.bytes + offset;
    }
  }
  return nullptr;
}

void Tracer::device_access(
    Worker& worker,
    uint64_t address,
    uint64_t size,
    Access access,
    uint32_t pc) {
  const Buffer* b = nullptr;
  for (const Buffer& candidate : memory_.buffers()) {
    uint64_t offset = address - uint64_t(candidate.data);
    if (offset < candidate.size && size <= candidate.size - offset) {
      b = &candidate;
      break;
    }
  }
  if (!b) {
    b = memory_.nearest(address);
    int64_t offset = b ? int64_t(address - uint64_t(b->data)) : 0;
    const bool starts_inside = b && offset >= 0 && uint64_t(offset) < b->size;
    report(
        worker,
        SIM_OUT_OF_BOUNDS,
        {b ? b->index : SIM_NO_BUFFER, offset},
        pc,
        verb(access) + std::to_string(size) + " bytes: " +
            memory_.describe(address + (starts_inside ? size - 1 : 0)));
    return;
  }
  count(address, size, access);
  Byte* bytes = device_bytes(address, size);
  if (!bytes) {
    if (writes(access)) {
      report(
          worker,
          SIM_OUT_OF_BOUNDS,
          {b->index, int64_t(address - uint64_t(b->data))},
          pc,
          memory_.describe(address));
    }
    return;
  }
  const Thread& t = worker.thread();
  Past now{
      worker.threadgroup() + 1,
      t.position.thread_index,
      t.group_epoch[kDevice],
      t.simd_epoch[kDevice],
      pc,
      atomic(access)};
  bool told = false;
  for (uint64_t i = 0; i < size; i++) {
    const Past* other = told ? nullptr : conflict(bytes[i], now, access);
    if (other) {
      Where where{b->index, int64_t(address + i - uint64_t(b->data))};
      report(worker, SIM_RACE, where, pc, verb(access), other);
      told = true;
    }
    remember(bytes[i], now, access);
  }
}

void Tracer::group_access(
    Worker& worker,
    uint64_t address,
    uint64_t size,
    Access access,
    uint32_t pc) {
  uint64_t offset = worker.memory().offset(address);
  Where where{SIM_THREADGROUP_MEMORY, int64_t(offset)};
  const auto* variable = worker.memory().find(address, size);
  if (!variable) {
    report(
        worker,
        SIM_OUT_OF_BOUNDS,
        where,
        pc,
        verb(access) + std::to_string(size) +
            " bytes outside every threadgroup variable");
    return;
  }
  where.offset = address - uint64_t(variable->data);
  report_.counts.threadgroup_read += reads(access) ? size : 0;
  report_.counts.threadgroup_written += writes(access) ? size : 0;
  const Thread& t = worker.thread();
  Past now{
      worker.threadgroup() + 1,
      t.position.thread_index,
      t.group_epoch[kThreadgroup],
      t.simd_epoch[kThreadgroup],
      pc,
      atomic(access)};
  bool raced = false, unwritten = false;
  for (uint64_t i = 0; i < size; i++) {
    Byte& byte = group_bytes_[offset + i];
    const Past* other = raced ? nullptr : conflict(byte, now, access);
    if (other) {
      report(worker, SIM_RACE, where, pc, verb(access), other);
      raced = true;
    }
    if (reads(access) && !byte.write.group && !unwritten) {
      report(
          worker,
          SIM_UNINITIALISED,
          where,
          pc,
          "read of threadgroup memory that nothing has written, byte " +
              std::to_string(where.offset) + " of a variable");
      unwritten = true;
    }
    remember(byte, now, access);
  }
}

const Tracer::Past*
Tracer::conflict(const Byte& byte, const Past& now, Access access) const {
  auto races = [&](const Past& before) {
    return before.group && !(before.atomic && now.atomic) &&
        !ordered(before, now);
  };
  if (races(byte.write)) {
    return &byte.write;
  }
  if (!writes(access)) {
    return nullptr;
  }
  for (const Past& read : byte.reads) {
    if (races(read)) {
      return &read;
    }
  }
  return nullptr;
}

void Tracer::remember(Byte& byte, const Past& now, Access access) {
  // Where a plain access, which other simdgroups are not yet in order with, is
  // replaced by an atomic one, that counts as plain, to stand for it too.
  auto replace = [&](Past& past) {
    const bool plain = past.group == now.group && !past.atomic &&
        past.group_epoch == now.group_epoch;
    past = now;
    past.atomic = now.atomic && !plain;
  };
  if (writes(access)) {
    replace(byte.write);
  }
  if (!reads(access)) {
    return;
  }
  for (Past& read : byte.reads) {
    if (!read.group || ordered(read, now)) {
      replace(read);
      return;
    }
  }
  auto simdgroup = [](const Past& p) {
    return uint64_t(p.group) << 32 | p.thread / kSimdWidth;
  };
  for (Past& read : byte.reads) {
    if (read.atomic && !now.atomic) {
      read = now;
      return;
    }
  }
  if (simdgroup(byte.reads[0]) == simdgroup(byte.reads[1])) {
    byte.reads[1] = now;
  }
}

void Tracer::report(
    Worker& worker,
    sim_finding_kind kind,
    const Where& where,
    uint32_t pc,
    const std::string& text,
    const Past* other) {
  uint32_t group = worker.threadgroup();
  uint32_t thread = worker.thread().position.thread_index;
  auto who = [](uint32_t group, uint32_t thread) {
    return "threadgroup " + std::to_string(group) + " thread " +
        std::to_string(thread);
  };
  Finding f{kind, where.buffer, where.offset, group, thread, 0, 0, {}, {}, {}};
  f.place.pc = pc;
  f.text = text;
  if (other) {
    f.other_threadgroup = other->group - 1;
    f.other_thread = other->thread;
    f.other_place.pc = other->pc;
    f.text += "byte " + std::to_string(where.offset) + " of " +
        (where.buffer == SIM_THREADGROUP_MEMORY
             ? "a threadgroup variable"
             : "buffer " + std::to_string(where.buffer));
  }
  f.text += " by " + who(group, thread);
  if (other) {
    f.text += " races with " + who(f.other_threadgroup, f.other_thread);
  }
  report_.add(f);
}

std::vector<sim_traffic> Tracer::traffic() const {
  std::vector<sim_traffic> all;
  for (const Shadow& s : shadows_) {
    sim_traffic t{s.buffer->index, s.read, s.written, 0, 0};
    for (uint64_t i = 0; i < s.buffer->size; i++) {
      t.unique_read += s.touched[i] & 1;
      t.unique_written += s.touched[i] >> 1;
    }
    all.push_back(t);
  }
  return all;
}

}  // namespace sim
