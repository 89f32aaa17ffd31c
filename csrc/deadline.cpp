#include "deadline.h"

#include <unistd.h>

#include <chrono>
#include <utility>

namespace glm_fused {

Deadline::Deadline(double seconds, std::string last_words, int code)
    : thread_([this, seconds, last_words = std::move(last_words), code] {
        wait(seconds, last_words, code);
      }) {}

Deadline::~Deadline() {
  lift();
}

void Deadline::lift() {
  {
    std::lock_guard lock(mutex_);
    lifted_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  }
}

void Deadline::wait(double seconds, const std::string& last_words, int code) {
  std::unique_lock lock(mutex_);
  const auto limit = std::chrono::duration<double>(seconds);
  if (changed_.wait_for(lock, limit, [this] { return lifted_; })) {
    return;
  }
  const auto line = last_words + "\n";
  [[maybe_unused]] const auto written =
      write(STDERR_FILENO, line.data(), line.size());
  _exit(code);
}

}  // namespace glm_fused
