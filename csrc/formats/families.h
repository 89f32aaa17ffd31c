// All families: a new one is included and listed here.
#pragma once

#include "formats/affine.h"
#include "formats/dense.h"
#include "formats/fp.h"
#include "formats/fp8.h"

namespace glm_fused {

template <Family family>
struct FamilyTag {
  static constexpr Family value = family;
};

// fn(FamilyTag<family>()).
template <class Fn>
decltype(auto) with_family(Family family, Fn&& fn) {
  switch (family) {
    case Family::affine:
      return fn(FamilyTag<Family::affine>());
    case Family::fp:
      return fn(FamilyTag<Family::fp>());
    case Family::fp8:
      return fn(FamilyTag<Family::fp8>());
    default:
      return fn(FamilyTag<Family::dense>());
  }
}

}  // namespace glm_fused
