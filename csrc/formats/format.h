// How the rows of a weight matrix are stored: the registry of all formats.
//
// A weight [..., n, k] is one to three arrays, its planes. A row of a plane is
// a whole number of elements for every block of `block` columns, and belongs to
// one row of the weight or to several. README.md in this folder says how a
// format is added.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "formats/gguf_formats.h"

namespace glm_fused {

enum class FloatType : uint8_t { float32, float16, bfloat16 };

inline size_t size_of(FloatType type) {
  return type == FloatType::float32 ? 4 : 2;
}

// Formats that share a header, formats/<family>.h, here and in metal/. GGUF's
// block formats, all of gguf.h, are a family each.
#define GLM_FAMILY(family, ...) , family
enum class Family : uint8_t {
  dense,
  affine,
  fp,
  fp8 GLM_GGUF_FORMATS(GLM_FAMILY)
};
#undef GLM_FAMILY

// Whether it is one of GGUF's block formats: one plane of bytes, in which
// scales lie among the codes.
constexpr bool is_gguf(Family family) {
  return family > Family::fp8;
}

// `floats` are of any of the three types, the same in all such planes.
enum class PlaneType : uint8_t {
  uint32,
  uint8,
  float32,
  float16,
  bfloat16,
  floats
};

struct PlaneSpec {
  std::string_view name;  // as the last part of a tensor's name
  PlaneType type = PlaneType::floats;
  int count = 0;  // elements a block
  // One element a matrix instead, [...], which multiplies its products.
  bool per_matrix = false;
  int rows = 1;  // of the weight that share a row of the plane
};

constexpr int kMaxPlanes = 3;

// One row of the registry.
struct FormatSpec {
  std::string_view name;  // in every output
  Family family;
  std::string_view mode;  // MLX's, "dense", or "" where MLX has none
  int bits;               // of a value, without its share of the scales
  int block;              // columns; MLX's group_size
  std::array<PlaneSpec, kMaxPlanes> planes;
  int plane_count;
  bool is_default = true;  // MLX's for its mode, where only that is given
};

// Every format that the kernels take, in the order of the registry.
std::span<const FormatSpec> formats();

// Null if there is none.
const FormatSpec* find_format(std::string_view name);

// A format as found in a weight: `float_type` is that of its values (dense) or
// of its planes of `floats`; float32 where it has neither.
struct Format {
  const FormatSpec* spec;
  FloatType float_type = FloatType::float32;

  Family family() const {
    return spec->family;
  }
  size_t element_bytes(int plane) const {
    switch (spec->planes[plane].type) {
      case PlaneType::uint32:
      case PlaneType::float32:
        return 4;
      case PlaneType::uint8:
        return 1;
      case PlaneType::floats:
        return size_of(float_type);
      default:
        return 2;
    }
  }
  // From row to row of the plane, and from matrix [n, k] to matrix.
  size_t row_bytes(int plane, int k) const {
    const PlaneSpec& p = spec->planes[plane];
    const size_t elements = static_cast<size_t>(k / spec->block) * p.count;
    return p.per_matrix ? 0 : elements * element_bytes(plane);
  }
  size_t matrix_bytes(int plane, int n, int k) const {
    const PlaneSpec& p = spec->planes[plane];
    const size_t rows = (n + p.rows - 1) / p.rows;
    return p.per_matrix ? element_bytes(plane) : rows * row_bytes(plane, k);
  }
};

// The dense format of values of `type`.
Format dense_format(FloatType type);

// MLX runs `qmv_fast` on whole tiles of eight rows and 512 columns and `qmv`
// elsewhere; the two give a lane different columns, so their sums differ in
// the last bits. Dense weights know one order.
inline bool uses_fast_order(const Format& format, int n, int k) {
  return format.family() != Family::dense && n % 8 == 0 && k % 512 == 0;
}

}  // namespace glm_fused
