#include "shutdown.h"

#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <thread>

namespace glm_fused {

#if defined(__GLIBC__)

namespace {

std::terminate_handler previous = nullptr;
std::thread::id ending;  // the thread that ends the interpreter

// A forced unwinding is no C++ exception, so there is no current one; nor is
// there where a std::thread is lost, but that happens on the ending thread.
[[noreturn]] void park_or_terminate() {
  if (!std::current_exception() && std::this_thread::get_id() != ending) {
    while (true) {
      pause();
    }
  }
  previous();
  std::abort();
}

}  // namespace

void park_threads_that_unwind() {
  ending = std::this_thread::get_id();
  if (const auto handler = std::get_terminate(); handler != park_or_terminate) {
    previous = handler;
    std::set_terminate(park_or_terminate);
  }
}

#else

void park_threads_that_unwind() {}  // elsewhere such a thread does not unwind

#endif

}  // namespace glm_fused
