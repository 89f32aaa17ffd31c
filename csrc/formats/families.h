// All families: a new one is included and listed here.
#pragma once

#include "formats/affine.h"
#include "formats/dense.h"
#include "formats/fp.h"
#include "formats/fp8.h"
#include "formats/gguf.h"

namespace glm_fused {

template <Family family>
struct FamilyTag {
  static constexpr Family value = family;
};

// fn(FamilyTag<family>()).
template <class Fn>
decltype(auto) with_family(Family family, Fn&& fn) {
#define GLM_GGUF_CASE(name, ...) \
  case Family::name:             \
    return fn(FamilyTag<Family::name>());
  switch (family) {
    GLM_GGUF_FORMATS(GLM_GGUF_CASE)
    case Family::affine:
      return fn(FamilyTag<Family::affine>());
    case Family::fp:
      return fn(FamilyTag<Family::fp>());
    case Family::fp8:
      return fn(FamilyTag<Family::fp8>());
    default:
      return fn(FamilyTag<Family::dense>());
  }
#undef GLM_GGUF_CASE
}

}  // namespace glm_fused
