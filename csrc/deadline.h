// Ends the process where it does not go on in time.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace glm_fused {

// Unless it is lifted within so many seconds, writes its last words to stderr
// and exits with a code: whoever holds Python's lock, and in whatever call.
class Deadline {
 public:
  Deadline(double seconds, std::string last_words, int code);
  ~Deadline();

  // Does nothing where it has been lifted already.
  void lift();

 private:
  void wait(double seconds, const std::string& last_words, int code);

  std::mutex mutex_;
  std::condition_variable changed_;
  bool lifted_ = false;
  std::thread thread_;
};

}  // namespace glm_fused
