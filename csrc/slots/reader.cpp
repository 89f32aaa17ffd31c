#include "slots/reader.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace glm_fused::slots {

namespace {

constexpr int64_t kAlign = Files::kDirectAlign;
constexpr int kMaxParts = 64;  // of one preadv; IOV_MAX is at least 1024

bool aligned(const std::vector<iovec>& to, int64_t offset) {
  return offset % kAlign == 0 &&
      std::all_of(to.begin(), to.end(), [](const iovec& part) {
           return reinterpret_cast<uintptr_t>(part.iov_base) % kAlign == 0 &&
               part.iov_len % kAlign == 0;
         });
}

// Drops the first `bytes` bytes.
void advance(std::vector<iovec>& to, size_t bytes) {
  size_t done = 0;
  while (done < to.size() && bytes >= to[done].iov_len) {
    bytes -= to[done++].iov_len;
  }
  to.erase(to.begin(), to.begin() + done);
  if (bytes > 0) {
    to[0].iov_base = static_cast<char*>(to[0].iov_base) + bytes;
    to[0].iov_len -= bytes;
  }
}

// Reads until `to` is full or the file ends, or `once`; returns the bytes read.
int64_t
read_some(int fd, std::vector<iovec> to, int64_t offset, bool once = false) {
  int64_t total = 0;
  while (!to.empty()) {
    const ssize_t got =
        preadv(fd, to.data(), static_cast<int>(to.size()), offset + total);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got < 0) {
      throw std::runtime_error(std::strerror(errno));
    }
    if (got == 0) {
      break;
    }
    total += got;
    if (once) {
      break;
    }
    advance(to, static_cast<size_t>(got));
  }
  return total;
}

// Each thread has aligned memory of its own, for reads that bypass the page
// cache but whose memory or offset such reads do not take.
class Bounce {
 public:
  Bounce() = default;
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;
  ~Bounce() {
    std::free(memory_);
  }

  std::byte* hold(int64_t bytes) {
    if (size_ < bytes) {
      std::free(memory_);
      memory_ = static_cast<std::byte*>(std::aligned_alloc(kAlign, bytes));
      size_ = memory_ ? bytes : 0;
      if (!memory_) {
        throw std::runtime_error("no memory for a read");
      }
    }
    return memory_;
  }

 private:
  std::byte* memory_ = nullptr;
  int64_t size_ = 0;
};

// Reads through a buffer, with whole blocks around the range.
int64_t read_bounced(
    Bounce& bounce,
    int fd,
    const std::vector<iovec>& to,
    int64_t offset,
    int64_t bytes) {
  const int64_t begin = offset / kAlign * kAlign;
  const int64_t end = (offset + bytes + kAlign - 1) / kAlign * kAlign;
  std::byte* buffer = bounce.hold(end - begin);
  int64_t got = 0;
  while (begin + got < offset + bytes) {
    // Reads go on from a whole block; what does not grow has ended.
    const int64_t from = got / kAlign * kAlign;
    const iovec rest{buffer + from, static_cast<size_t>(end - begin - from)};
    const int64_t more = read_some(fd, {rest}, begin + from, true);
    if (from + more <= got) {
      break;
    }
    got = from + more;
  }
  const std::byte* from = buffer + (offset - begin);
  for (const iovec& part : to) {
    std::memcpy(part.iov_base, from, part.iov_len);
    from += part.iov_len;
  }
  return std::min(bytes, got - (offset - begin));
}

}  // namespace

struct Reader::Job {
  std::shared_ptr<const Files> files;
  Done done;
  std::atomic<int> left;
  std::mutex mutex;
  std::string error;  // the first
};

Reader::Reader(int depth, int64_t split) : split_(split) {
  if (depth < 1 || depth > 256 || split < kAlign || split % kAlign != 0) {
    throw std::invalid_argument(
        "[slots] reads need a depth of 1 to 256 and a split of whole 4096-byte "
        "blocks, got " +
        std::to_string(depth) + " and " + std::to_string(split) + ".");
  }
  threads_ = start_threads("reads", depth, [this] { work(); });
  if (threads_.empty()) {
    throw std::runtime_error(
        "[slots] experts cannot be read: no thread could be created.");
  }
}

Reader::~Reader() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& thread : threads_) {
    thread.join();
  }
}

void Reader::read(
    std::shared_ptr<const Files> files,
    const std::vector<Extent>& extents,
    bool urgent,
    Done done) {
  auto job = std::make_shared<Job>();
  job->files = std::move(files);
  job->done = std::move(done);
  auto pieces = split(job, extents);
  if (pieces.empty()) {
    job->done("");
    return;
  }
  job->left = static_cast<int>(pieces.size());
  {
    std::lock_guard lock(mutex_);
    auto& queue = urgent ? urgent_ : later_;
    // It queues all of them or, if there is no memory, none.
    queue.insert(
        queue.end(),
        std::make_move_iterator(pieces.begin()),
        std::make_move_iterator(pieces.end()));
  }
  wake_.notify_all();
}

std::vector<Reader::Piece> Reader::split(
    const std::shared_ptr<Job>& job,
    const std::vector<Extent>& extents) const {
  std::vector<Piece> pieces;
  for (Extent e : extents) {
    while (e.bytes > 0) {
      const bool joins = !pieces.empty() && pieces.back().file == e.file &&
          pieces.back().offset + pieces.back().bytes == e.offset &&
          pieces.back().bytes < split_ && pieces.back().to.size() < kMaxParts;
      if (!joins) {
        pieces.push_back({job, e.file, e.offset, 0, {}});
      }
      Piece& piece = pieces.back();
      const int64_t bytes = std::min(e.bytes, split_ - piece.bytes);
      piece.to.push_back({e.to, static_cast<size_t>(bytes)});
      piece.bytes += bytes;
      e.offset += bytes;
      e.bytes -= bytes;
      e.to += bytes;
    }
  }
  return pieces;
}

namespace {

// Returns what went wrong, or an empty text.
std::string read_piece(
    const Files& files,
    int file,
    const std::vector<iovec>& to,
    int64_t offset,
    int64_t bytes,
    Bounce& bounce) {
  const int fd = files.fd(file);
  const int64_t got = files.aligned_only() && !aligned(to, offset)
      ? read_bounced(bounce, fd, to, offset, bytes)
      : read_some(fd, to, offset);
  if (got >= bytes) {
    return files.changed(file);
  }
  return "ends after " + std::to_string(std::max<int64_t>(got, 0)) + " of " +
      std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
      " (truncated?)";
}

// Returns the same with the file's name, whatever memory is left.
template <class Piece>
std::string outcome(const Piece& piece, Bounce& bounce) noexcept {
  const Files& files = *piece.job->files;
  try {
    std::string error;
    try {
      error = read_piece(
          files, piece.file, piece.to, piece.offset, piece.bytes, bounce);
    } catch (const std::runtime_error& failure) {
      error = failure.what();
    }
    return error.empty() ? error : files.path(piece.file) + ": " + error;
  } catch (const std::exception&) {
    return "out of memory.";  // a text so short takes none
  }
}

}  // namespace

void Reader::work() {
  Bounce bounce;
  while (true) {
    std::unique_lock lock(mutex_);
    wake_.wait(
        lock, [&] { return stop_ || !urgent_.empty() || !later_.empty(); });
    auto& queue = urgent_.empty() ? later_ : urgent_;
    if (queue.empty()) {
      return;
    }
    const Piece piece = std::move(queue.front());
    queue.pop_front();
    lock.unlock();
    finish(*piece.job, outcome(piece, bounce));
  }
}

void Reader::finish(Job& job, std::string error) noexcept {
  if (!error.empty()) {
    std::lock_guard lock(job.mutex);
    if (job.error.empty()) {
      job.error = std::move(error);
    }
  }
  if (job.left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    job.done(job.error);
  }
}

}  // namespace glm_fused::slots
