#include "headed_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "mlx/io/load.h"

namespace glm_fused {

namespace {

// A few bytes of memory with a file behind them.
class HeadedFile : public mx::io::Reader {
 public:
  HeadedFile(const std::string& path, std::string head)
      : path_(path),
        head_(std::move(head)),
        fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) {
      throw std::runtime_error(
          "[load] cannot open " + path + ": " + std::strerror(errno));
    }
  }

  ~HeadedFile() override {
    close(fd_);
  }

  HeadedFile(const HeadedFile&) = delete;
  HeadedFile& operator=(const HeadedFile&) = delete;

  bool is_open() const override {
    return true;
  }

  bool good() const override {
    return true;
  }

  size_t tell() override {
    return position_;
  }

  void seek(int64_t offset, std::ios_base::seekdir way) override {
    if (way == std::ios_base::beg) {
      position_ = offset;
    } else if (way == std::ios_base::cur) {
      position_ += offset;
    } else {
      position_ = head_.size() + lseek(fd_, 0, SEEK_END) + offset;
    }
  }

  void read(char* data, size_t n) override {
    read(data, n, position_);
    position_ += n;
  }

  // Several threads may call this at once.
  void read(char* data, size_t n, size_t offset) override {
    if (offset < head_.size()) {
      const size_t of_head = std::min(n, head_.size() - offset);
      std::memcpy(data, head_.data() + offset, of_head);
      data += of_head;
      n -= of_head;
      offset += of_head;
    }
    while (n > 0) {
      const ssize_t read =
          pread(fd_, data, std::min(n, kMost), offset - head_.size());
      if (read < 0 && errno == EINTR) {
        continue;
      }
      if (read < 0) {
        throw std::runtime_error(
            "[load] " + path_ + " cannot be read at byte " +
            std::to_string(offset - head_.size()) + ": " +
            std::strerror(errno));
      }
      if (read == 0) {
        throw std::runtime_error(
            "[load] " + path_ + " ends before byte " +
            std::to_string(offset - head_.size() + n));
      }
      data += read;
      n -= read;
      offset += read;
    }
  }

  std::string label() const override {
    return "file " + path_;
  }

 private:
  static constexpr size_t kMost = size_t(1) << 30;  // macOS refuses 2 GiB

  const std::string path_;
  const std::string head_;
  const int fd_;
  size_t position_ = 0;
};

}  // namespace

std::unordered_map<std::string, mx::array> load_with_header(
    const std::string& path,
    const std::string& header) {
  const uint64_t length = header.size();
  std::string head(sizeof length, '\0');
  std::memcpy(head.data(), &length, sizeof length);  // little-endian, as we are
  return mx::load_safetensors(std::make_shared<HeadedFile>(path, head + header))
      .first;
}

}  // namespace glm_fused
