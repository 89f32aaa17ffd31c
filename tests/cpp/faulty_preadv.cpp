// preadv with faults, to preload: FAULT is EINTR (every other call), SHORT (a
// few bytes at a time), EIO (every call) or BACKWARDS (of the reads in flight
// the one furthest in its file ends first, and the first at the first expert
// of a sidecar fails).
#include <dlfcn.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>

namespace {

constexpr off_t kFirstExpert = 16384;

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

}  // namespace

extern "C" ssize_t
preadv(int fd, const struct iovec* to, int count, off_t offset) {
  using Preadv = ssize_t (*)(int, const struct iovec*, int, off_t);
  static const auto real = reinterpret_cast<Preadv>(dlsym(RTLD_NEXT, "preadv"));
  static const char* fault = std::getenv("FAULT");
  static std::atomic<int> calls{0};
  const int call = calls++;
  if (!std::strcmp(fault, "EINTR") && call % 2 == 0) {
    errno = EINTR;
    return -1;
  }
  if (!std::strcmp(fault, "BACKWARDS")) {
    wait_for_turn(offset);
    static std::atomic<bool> failed{false};
    if (offset == kFirstExpert && !failed.exchange(true)) {
      errno = EIO;
      return -1;
    }
  }
  if (!std::strcmp(fault, "EIO")) {
    errno = EIO;
    return -1;
  }
  if (!std::strcmp(fault, "SHORT")) {
    // Bypassing the page cache takes whole blocks.
    struct iovec first = to[0];
    const size_t most =
        reinterpret_cast<size_t>(first.iov_base) % 4096 || first.iov_len % 4096
        ? 1000
        : 4096;
    first.iov_len = std::min<size_t>(first.iov_len, most);
    return real(fd, &first, 1, offset);
  }
  return real(fd, to, count, offset);
}
