// Memory in the system's huge pages, 2 MiB where pages have 4 KiB: a fraction
// of the look-ups of addresses, so that weights are read faster.
#pragma once

#include <cstddef>
#include <string>

namespace glm_fused {

// What the system's owner chose for huge pages that programs do not reserve:
// "always", "madvise" (where they ask) or "never"; empty where there are none.
const std::string& huge_page_setting();

// Asks for huge pages wherever memory is first touched from now on, in the
// whole ones of [at, at + bytes).
void ask_for_huge_pages(void* at, size_t bytes);

// Moves what lies in [at, at + bytes) to huge pages; its values stay. Returns
// the bytes of those, 0 where the system has none, or none left.
size_t move_to_huge_pages(void* at, size_t bytes);

}  // namespace glm_fused
