#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#endif

namespace glm_fused {

#if defined(__linux__)

namespace {

constexpr int kCollapse = 25;        // MADV_COLLAPSE, of Linux 6.1
constexpr size_t kPagesAtOnce = 32;  // moved by one call

const std::string kFolder = "/sys/kernel/mm/transparent_hugepage/";

// The file lists all choices, the one that holds in brackets.
std::string read_setting() {
  std::string choice;
  for (std::ifstream file(kFolder + "enabled"); file >> choice;) {
    if (choice.front() == '[' && choice.back() == ']') {
      return choice.substr(1, choice.size() - 2);
    }
  }
  return "";
}

// 0 where huge pages may not be used.
size_t page_bytes() {
  static const size_t size = [] {
    const std::string& setting = huge_page_setting();
    size_t bytes = 0;
    if (setting == "always" || setting == "madvise") {
      std::ifstream(kFolder + "hpage_pmd_size") >> bytes;
    }
    return bytes;
  }();
  return size;
}

// Calls each(page, bytes) for the whole huge pages of a range together; none of
// it where there is none.
template <class Each>
void with_whole_pages(void* at, size_t bytes, const Each& each) {
  const size_t page = page_bytes();
  if (bytes < page || page == 0) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + bytes) / page * page;
  if (first < last) {
    each(reinterpret_cast<char*>(first), last - first);
  }
}

}  // namespace

const std::string& huge_page_setting() {
  static const std::string setting = read_setting();
  return setting;
}

void ask_for_huge_pages(void* at, size_t bytes) {
  with_whole_pages(at, bytes, [](char* first, size_t size) {
    madvise(first, size, MADV_HUGEPAGE);
  });
}

size_t move_to_huge_pages(void* at, size_t bytes) {
  size_t moved = 0;
  with_whole_pages(at, bytes, [&](char* first, size_t size) {
    // Kernels before 6.1 move them in their own time.
    madvise(first, size, MADV_HUGEPAGE);
    while (moved < size) {
      const size_t part = std::min(kPagesAtOnce * page_bytes(), size - moved);
      if (madvise(first + moved, part, kCollapse) != 0) {
        break;
      }
      moved += part;
    }
  });
  return moved;
}

#else

const std::string& huge_page_setting() {
  static const std::string none;
  return none;
}

void ask_for_huge_pages(void*, size_t) {}

size_t move_to_huge_pages(void*, size_t) {
  return 0;
}

#endif

}  // namespace glm_fused
