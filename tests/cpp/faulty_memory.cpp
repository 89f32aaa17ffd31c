// A library to preload, by which memory or threads cannot be had: some calls
// are granted, then one fails, or all. They are the calls of operator new and
// aligned_alloc by code in a range of addresses, and those for any thread.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

struct Fault {
  std::atomic<int64_t> calls{0}, hits{0}, first{-1};
  std::atomic<bool> onwards{false};

  bool hit() {
    const int64_t at = first.load(std::memory_order_relaxed);
    const int64_t call = calls.fetch_add(1, std::memory_order_relaxed);
    const bool hit = at >= 0 && (onwards ? call >= at : call == at);
    hits += hit;
    return hit;
  }
};

Fault memory, threads;
std::atomic<uintptr_t> low{0}, high{0};

bool refused(void* caller) {
  const auto at = reinterpret_cast<uintptr_t>(caller);
  return at >= low.load(std::memory_order_relaxed) &&
      at < high.load(std::memory_order_relaxed) && memory.hit();
}

void* allocate(size_t bytes, size_t alignment, void* caller) {
  void* p = nullptr;
  if (!refused(caller)) {
    p = alignment ? nullptr : std::malloc(bytes ? bytes : 1);
    if (alignment && posix_memalign(&p, alignment, bytes ? bytes : 1) != 0) {
      p = nullptr;
    }
  }
  return p;
}

void* granted(void* p) {
  if (!p) {
    throw std::bad_alloc();
  }
  return p;
}

}  // namespace

#define CALLER __builtin_return_address(0)

void* operator new(size_t n) {
  return granted(allocate(n, 0, CALLER));
}
void* operator new[](size_t n) {
  return granted(allocate(n, 0, CALLER));
}
void* operator new(size_t n, std::align_val_t a) {
  return granted(allocate(n, static_cast<size_t>(a), CALLER));
}
void* operator new[](size_t n, std::align_val_t a) {
  return granted(allocate(n, static_cast<size_t>(a), CALLER));
}
void* operator new(size_t n, const std::nothrow_t&) noexcept {
  return allocate(n, 0, CALLER);
}
void* operator new[](size_t n, const std::nothrow_t&) noexcept {
  return allocate(n, 0, CALLER);
}

extern "C" {

void* aligned_alloc(size_t alignment, size_t bytes) {
  return allocate(bytes, alignment, CALLER);
}

int pthread_create(
    pthread_t* thread,
    const pthread_attr_t* attributes,
    void* (*run)(void*),
    void* argument) {
  using Create =
      int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real =
      reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  return threads.hit() ? EAGAIN : real(thread, attributes, run, argument);
}

// Has memory fail that code in [from, to) asks for.
void memory_watch(uintptr_t from, uintptr_t to) {
  low = from;
  high = to;
}

// Has call `first`, counted from 0, fail, or none where first < 0; `onwards`
// has all that follow fail, too. `what` is 0 for memory, 1 for threads.
void memory_arm(int what, int64_t first, int onwards) {
  Fault& f = what ? threads : memory;
  f.first = -1;
  f.calls = 0;
  f.hits = 0;
  f.onwards = onwards != 0;
  f.first = first;
}

int64_t memory_calls(int what) {
  return what ? threads.calls : memory.calls;
}

int64_t memory_hits(int what) {
  return what ? threads.hits : memory.hits;
}
}
