#include <algorithm>

#include "formats/families.h"

namespace glm_fused {

namespace {

constexpr FormatSpec dense(std::string_view name, PlaneType type) {
  return {
      name, Family::dense, "dense", 0, 1, {{{"weight", type, 1}}}, 1, false};
}

// MLX packs the values of a group into whole 32-bit words.
constexpr PlaneSpec packed(int bits, int group_size) {
  return {"weight", PlaneType::uint32, group_size * bits / 32};
}

constexpr FormatSpec affine(std::string_view name, int bits, int group_size) {
  return {
      name,
      Family::affine,
      "affine",
      bits,
      group_size,
      {{packed(bits, group_size),
        {"scales", PlaneType::floats, 1},
        {"biases", PlaneType::floats, 1}}},
      3,
      bits == 4 && group_size == 64};
}

constexpr FormatSpec fp(std::string_view mode, int bits, int group_size) {
  return {
      mode,
      Family::fp,
      mode,
      bits,
      group_size,
      {{packed(bits, group_size), {"scales", PlaneType::uint8, 1}}},
      2};
}

// modelopt's: an fp32 factor a matrix on top of the scales.
constexpr FormatSpec scaled(std::string_view name, FormatSpec format) {
  format.name = name;
  format.is_default = false;
  format.planes[format.plane_count] = {
      "global_scale", PlaneType::float32, 0, true};
  format.plane_count++;
  return format;
}

// Released checkpoints': a scale for a square of `size` rows and columns.
constexpr FormatSpec fp8(std::string_view name, int size) {
  return {
      name,
      Family::fp8,
      "",
      8,
      size,
      {{{"weight", PlaneType::uint8, size},
        {"scales", PlaneType::floats, 1, false, size}}},
      2,
      false};
}

// GGUF's: blocks as they lie in a file.
template <Family family>
constexpr FormatSpec gguf(std::string_view name, int bits) {
  using Block = BlockOf<family>::type;
  return {
      name,
      family,
      "",
      bits,
      Block::columns,
      {{{"weight", PlaneType::uint8, Block::bytes}}},
      1,
      false};
}

// A group size is part of the name where it is not MLX's default.
#define GLM_GGUF_ROW(family, block, name, bits) \
  gguf<Family::family>(name, bits),
constexpr FormatSpec kFormats[] = {
    dense("bf16", PlaneType::bfloat16),
    dense("fp16", PlaneType::float16),
    dense("fp32", PlaneType::float32),
    affine("affine2-g32", 2, 32),
    affine("affine2", 2, 64),
    affine("affine2-g128", 2, 128),
    affine("affine3-g32", 3, 32),
    affine("affine3", 3, 64),
    affine("affine3-g128", 3, 128),
    affine("affine4-g32", 4, 32),
    affine("affine4", 4, 64),
    affine("affine4-g128", 4, 128),
    affine("affine5-g32", 5, 32),
    affine("affine5", 5, 64),
    affine("affine5-g128", 5, 128),
    affine("affine6-g32", 6, 32),
    affine("affine6", 6, 64),
    affine("affine6-g128", 6, 128),
    affine("affine8-g32", 8, 32),
    affine("affine8", 8, 64),
    affine("affine8-g128", 8, 128),
    fp("mxfp4", 4, 32),
    fp("mxfp8", 8, 32),
    fp("nvfp4", 4, 16),
    scaled("nvfp4-global", fp("nvfp4", 4, 16)),
    fp8("fp8", 128),
    GLM_GGUF_FORMATS(GLM_GGUF_ROW)};
#undef GLM_GGUF_ROW

}  // namespace

std::span<const FormatSpec> formats() {
  return kFormats;
}

const FormatSpec* find_format(std::string_view name) {
  const auto* found =
      std::ranges::find(kFormats, name, [](const auto& f) { return f.name; });
  return found == std::end(kFormats) ? nullptr : found;
}

Format dense_format(FloatType type) {
  return {
      find_format(
          type == FloatType::float32       ? "fp32"
              : type == FloatType::float16 ? "fp16"
                                           : "bf16"),
      type};
}

}  // namespace glm_fused
