// How the kernels share out their work; the results do not depend on it.
#pragma once

#include <string>

#include "formats/format.h"

namespace glm_fused::metal {

struct Tiles {
  int rows;     // rows of a weight per simdgroup: 1, 2, 4 or 8
  int gate_up;  // simdgroups per threadgroup
  int down;
  int router;           // of its logits, a row of the weight per simdgroup
  bool narrow = false;  // whether MLX has a narrower tile for some matrices

  // Gives the rows per simdgroup of a matrix [n, k] that is no expert's.
  int rows_of(const Format& format, int n, int k) const;
};

// Is called once a device, before its first kernel. Chooses by architecture
// string ("applegpu_g16s"), unless
// GLM_FUSED_METAL_TILES, e.g. "4,2,8,2", gives rows and the three simdgroup
// counts.
Tiles tiles_for(const std::string& architecture);

}  // namespace glm_fused::metal
