// A reader keeps a pool of threads for positional reads.
#pragma once

#include <sys/uio.h>

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "slots/files.h"

namespace glm_fused::slots {

// An extent is a range of a file and where it goes.
struct Extent {
  int file;
  int64_t offset;
  int64_t bytes;
  std::byte* to;
};

class Reader {
 public:
  // Is called on a reader's thread with an empty text, or with what went wrong;
  // it must not throw.
  using Done = std::function<void(const std::string& error)>;

  // Up to `depth` reads of up to `split` bytes are in flight at a time, fewer
  // where the system gives fewer threads. Throws std::runtime_error if it gives
  // none.
  Reader(int depth, int64_t split);
  // Finishes what was asked for.
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Reads all `extents`, then calls `done`. Extents that follow one another in
  // their file become one read. `urgent` reads go before the others. If it
  // throws, nothing is read and `done` is not called.
  void read(
      std::shared_ptr<const Files> files,
      const std::vector<Extent>& extents,
      bool urgent,
      Done done);

 private:
  struct Job;
  struct Piece {
    std::shared_ptr<Job> job;
    int file;
    int64_t offset;
    int64_t bytes;
    std::vector<iovec> to;
  };

  std::vector<Piece> split(
      const std::shared_ptr<Job>& job,
      const std::vector<Extent>& extents) const;
  void work();
  static void finish(Job& job, std::string error) noexcept;

  const int64_t split_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Piece> urgent_, later_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace glm_fused::slots
