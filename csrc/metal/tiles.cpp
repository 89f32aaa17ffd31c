#include "metal/tiles.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "checks.h"

namespace glm_fused::metal {

namespace {

struct Generation {
  std::string_view prefix;  // the longest match comes first
  Tiles tiles;
};

// These are MLX's own tiles, four rows and two simdgroups, until measured
// otherwise.
constexpr Generation kGenerations[] = {
    {"applegpu_g17s", {4, 2, 8, 2, true}},  // M5 Max
    {"applegpu_", {4, 2, 8, 2}},
};
constexpr Tiles kOther{4, 2, 8, 2};

bool valid(const Tiles& t) {
  const auto simdgroups = [](int n) { return n >= 1 && n <= 32; };
  const bool rows = t.rows == 1 || t.rows == 2 || t.rows == 4 || t.rows == 8;
  return rows && simdgroups(t.gate_up) && simdgroups(t.down) &&
      simdgroups(t.router);
}

Tiles parse(const char* text) {
  Tiles t{};
  char rest;
  const int found = std::sscanf(
      text, "%d,%d,%d,%d%c", &t.rows, &t.gate_up, &t.down, &t.router, &rest);
  if (found != 4 || !valid(t)) {
    invalid(
        "metal",
        "GLM_FUSED_METAL_TILES must be rows (1, 2, 4 or 8) and three "
        "simdgroup counts (1 to 32), such as 4,2,8,2, but is ",
        text,
        ".");
  }
  return t;
}

}  // namespace

// As `qmv` in MLX's quantized.cpp chooses.
int Tiles::rows_of(const Format& format, int n, int k) const {
  const bool few = narrow && format.spec->mode == "nvfp4" && n >= 4096 &&
      uses_fast_order(format, n, k);
  return few ? 2 : rows;
}

Tiles tiles_for(const std::string& architecture) {
  if (const char* text = std::getenv("GLM_FUSED_METAL_TILES")) {
    return parse(text);
  }
  for (const auto& [prefix, tiles] : kGenerations) {
    if (architecture.starts_with(prefix)) {
      return tiles;
    }
  }
  return kOther;
}

}  // namespace glm_fused::metal
