// These replay recorded requests without files or memory.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace glm_fused::slots {

// Counts the distinct experts that were resident when a request came, and those
// that were not, over all `requests` of one layer. Throws std::invalid_argument
// for a bank that is too small for one of them.
std::pair<int64_t, int64_t> simulate(
    const std::string& policy,
    int experts,
    int slots,
    const std::vector<int>& pinned,
    const std::vector<std::vector<int>>& requests);

// Counts the same for Belady's optimum, where the expert whose next use is
// farthest away gives way.
std::pair<int64_t, int64_t> simulate_optimum(
    int experts,
    int slots,
    const std::vector<std::vector<int>>& requests);

}  // namespace glm_fused::slots
