// preadv with faults, to preload: FAULT is EINTR (every other call), SHORT (a
// few bytes at a time) or EIO (every call).
#include <dlfcn.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>

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
