// A library to preload, with faults in preadv, which reads experts, and pread,
// by which MLX loads. For preadv FAULT in the environment is EINTR (every other
// call), SHORT (a few bytes at a time), EIO (every call) or BACKWARDS (of the
// reads in flight the one furthest in its file ends first, and the first at the
// first expert of a sidecar fails). Without it, `faults_arm` says from inside
// of the process which calls fail, and how.
#include <dlfcn.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <thread>

namespace {

constexpr off_t kFirstExpert = 16384;
constexpr size_t kBlock = 4096;

// What befalls a call; the numbers are those of tests/adversarial.
enum Kind { kNone, kError, kEnd, kShort, kDelay, kWrongByte };

struct Plan {
  int kind = kNone;
  int error = EIO;
  int64_t first = 0, count = 0;  // these calls are hit
  int permille = 0;              // and so many of a thousand others
  uint64_t seed = 0;
};

// The state of one of the two functions.
struct State {
  std::mutex mutex;
  Plan plan;
  int64_t calls = 0, hits = 0;
};

State states[2];  // those of preadv and of pread

uint64_t hash(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Returns the plan of this call, whose kind is kNone if it is spared, and sets
// its chance.
Plan next_call(State& s, uint64_t& chance) {
  std::lock_guard lock(s.mutex);
  const int64_t call = s.calls++;
  chance = hash(s.plan.seed + hash(call + 1));
  const bool hit =
      (call >= s.plan.first && call < s.plan.first + s.plan.count) ||
      static_cast<int>(chance % 1000) < s.plan.permille;
  if (s.plan.kind == kNone || !hit) {
    return {};
  }
  s.hits++;
  return s.plan;
}

// Returns when no read that is in flight is further in its file.
void wait_for_turn(off_t offset) {
  static std::mutex mutex;
  static std::condition_variable changed;
  static std::multiset<off_t> in_flight;
  std::unique_lock lock(mutex);
  const auto self = in_flight.insert(offset);
  lock.unlock();
  std::this_thread::sleep_for(std::chrono::milliseconds(2));  // others join
  lock.lock();
  changed.wait(lock, [&] { return *in_flight.rbegin() == offset; });
  in_flight.erase(self);
  changed.notify_all();
}

using Preadv = ssize_t (*)(int, const struct iovec*, int, off_t);

ssize_t fail(int error) {
  errno = error;
  return -1;
}

// Bypassing the page cache takes whole blocks.
ssize_t read_short(
    Preadv real,
    int fd,
    const struct iovec* to,
    off_t offset,
    size_t bytes) {
  struct iovec first = to[0];
  const bool direct = reinterpret_cast<size_t>(first.iov_base) % kBlock == 0 &&
      first.iov_len % kBlock == 0;
  first.iov_len = std::min(first.iov_len, direct ? kBlock : bytes);
  return real(fd, &first, 1, offset);
}

ssize_t read_wrong(
    Preadv real,
    int fd,
    const struct iovec* to,
    int count,
    off_t offset,
    uint64_t chance) {
  ssize_t got = real(fd, to, count, offset);
  if (got <= 0) {
    return got;
  }
  auto at = static_cast<size_t>(chance / 1000 % static_cast<uint64_t>(got));
  while (at >= to->iov_len) {
    at -= to++->iov_len;
  }
  static_cast<uint8_t*>(to->iov_base)[at] ^= 1 << (chance >> 60 & 7);
  return got;
}

ssize_t planned(
    State& state,
    Preadv real,
    int fd,
    const struct iovec* to,
    int count,
    off_t offset) {
  uint64_t chance = 0;
  const Plan p = next_call(state, chance);
  switch (p.kind) {
    case kError:
      return fail(p.error);
    case kEnd:
      return 0;
    case kShort:
      return read_short(real, fd, to, offset, 1 + chance / 1000 % 1500);
    case kDelay:
      std::this_thread::sleep_for(
          std::chrono::microseconds(chance / 1000 % 3000));
      return real(fd, to, count, offset);
    case kWrongByte:
      return read_wrong(real, fd, to, count, offset, chance);
    default:
      return real(fd, to, count, offset);
  }
}

}  // namespace

// From now on calls `first` to `first + count` of a function (0 is preadv, 1
// pread), counted from 0, are hit, and of the others about `permille` in a
// thousand.
extern "C" void faults_arm(
    int function,
    int kind,
    int error,
    int64_t first,
    int64_t count,
    int permille,
    uint64_t seed) {
  State& s = states[function];
  std::lock_guard lock(s.mutex);
  s.plan = {kind, error, first, count, permille, seed};
  s.calls = s.hits = 0;
}

extern "C" int64_t faults_calls(int function) {
  std::lock_guard lock(states[function].mutex);
  return states[function].calls;
}

extern "C" int64_t faults_hits(int function) {
  std::lock_guard lock(states[function].mutex);
  return states[function].hits;
}

extern "C" ssize_t
preadv(int fd, const struct iovec* to, int count, off_t offset) {
  static const auto real = reinterpret_cast<Preadv>(dlsym(RTLD_NEXT, "preadv"));
  static const char* variable = std::getenv("FAULT");
  static const std::string fault = variable ? variable : "";
  static std::atomic<int> call{0};
  static std::atomic<bool> failed{false};
  if (fault.empty()) {
    return planned(states[0], real, fd, to, count, offset);
  }
  if (fault == "EIO" || (fault == "EINTR" && call++ % 2 == 0)) {
    return fail(fault == "EIO" ? EIO : EINTR);
  }
  if (fault == "SHORT") {
    return read_short(real, fd, to, offset, 1000);
  }
  if (fault == "BACKWARDS") {
    wait_for_turn(offset);
    if (offset == kFirstExpert && !failed.exchange(true)) {
      return fail(EIO);
    }
  }
  return real(fd, to, count, offset);
}

extern "C" ssize_t pread(int fd, void* to, size_t bytes, off_t offset) {
  const iovec part{to, bytes};
  const auto real =
      [](int f, const struct iovec* parts, int, off_t at) -> ssize_t {
    using Pread = ssize_t (*)(int, void*, size_t, off_t);
    static const auto next = reinterpret_cast<Pread>(dlsym(RTLD_NEXT, "pread"));
    return next(f, parts->iov_base, parts->iov_len, at);
  };
  return planned(states[1], real, fd, &part, 1, offset);
}
