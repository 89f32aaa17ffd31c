#include "slots/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace glm_fused::slots {

namespace {

int64_t modified_ns(const struct stat& status) {
#if defined(__APPLE__)
  const timespec& t = status.st_mtimespec;
#else
  const timespec& t = status.st_mtim;
#endif
  return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

int open_flags(bool direct) {
#if defined(O_DIRECT)
  return O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0);
#else
  static_cast<void>(direct);
  return O_RDONLY | O_CLOEXEC;
#endif
}

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error("[slots] " + path + ": " + what);
}

}  // namespace

Files::Files(
    const std::vector<std::string>& paths,
    const std::vector<int64_t>& sizes,
    bool direct)
    : direct_(direct) {
  if (paths.size() != sizes.size()) {
    throw std::invalid_argument(
        "[slots] " + std::to_string(paths.size()) + " files have " +
        std::to_string(sizes.size()) + " sizes.");
  }
  try {
    for (size_t i = 0; i < paths.size(); i++) {
      open_file(paths[i], sizes[i]);
    }
  } catch (...) {
    close_all();
    throw;
  }
}

Files::~Files() {
  close_all();
}

void Files::open_file(const std::string& path, int64_t size) {
  const int fd = open(path.c_str(), open_flags(direct_));
  if (fd < 0) {
    const char* hint = direct_ && errno == EINVAL
        ? " (its file system cannot bypass the page cache)"
        : "";
    fail(path, std::string(std::strerror(errno)) + hint);
  }
  files_.push_back({path, fd, size, 0});
#if defined(F_NOCACHE)
  if (direct_ && fcntl(fd, F_NOCACHE, 1) < 0) {
    fail(path, std::string("F_NOCACHE: ") + std::strerror(errno));
  }
#endif
  struct stat status;
  if (fstat(fd, &status) < 0) {
    fail(path, std::strerror(errno));
  }
  if (status.st_size != size) {
    fail(
        path,
        std::to_string(status.st_size) + " bytes, expected " +
            std::to_string(size) + ".");
  }
  files_.back().modified_ns = modified_ns(status);
}

void Files::close_all() {
  for (const File& file : files_) {
    close(file.fd);
  }
}

bool Files::aligned_only() const {
#if defined(O_DIRECT)
  return direct_;
#else
  return false;
#endif
}

std::string Files::changed(int file) const {
  const File& f = files_[file];
  struct stat status;
  if (fstat(f.fd, &status) < 0) {
    return std::strerror(errno);
  }
  if (status.st_size != f.size || modified_ns(status) != f.modified_ns) {
    return "was written to while it was in use (" +
        std::to_string(status.st_size) + " bytes, " + std::to_string(f.size) +
        " when it was opened)";
  }
  return "";
}

}  // namespace glm_fused::slots
