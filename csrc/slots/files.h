// These are the open files that experts are read from.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace glm_fused::slots {

class Files {
 public:
  // Reads bypass the page cache if `direct`. Throws std::runtime_error, naming
  // the file, for one that does not open or has another size.
  Files(
      const std::vector<std::string>& paths,
      const std::vector<int64_t>& sizes,
      bool direct);
  ~Files();
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;

  int fd(int file) const {
    return files_[file].fd;
  }
  int64_t size(int file) const {
    return files_[file].size;
  }
  int count() const {
    return static_cast<int>(files_.size());
  }
  const std::string& path(int file) const {
    return files_[file].path;
  }
  // Tells whether offsets, sizes and addresses must be multiples of
  // kDirectAlign.
  bool aligned_only() const;

  // Says how the file was written to since it was opened; empty if it was not.
  std::string changed(int file) const;

  static constexpr int64_t kDirectAlign = 4096;

 private:
  struct File {
    std::string path;
    int fd;
    int64_t size;
    int64_t modified_ns;
  };
  void open_file(const std::string& path, int64_t size);
  void close_all();

  std::vector<File> files_;
  bool direct_;
};

}  // namespace glm_fused::slots
