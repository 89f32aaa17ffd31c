// Several products of the same vectors as one launch (metal/project.h).
#pragma once

#include <vector>

#include "metal/pipelines.h"

namespace glm_fused::metal {

// The weight's planes, [n, k] or [heads, n, k], from `planes` on.
struct Product {
  const mx::array* planes;
  const Format* format;
  mx::array* y;  // has its memory
  int token_stride, head_stride;
  bool wide = false;  // stored as fp32

  int rows() const {
    return planes->shape(-2);
  }
};

// Vectors of `columns` values, rounded to `type`.
struct Vectors {
  const mx::array& x;
  mx::Dtype type;
  int tokens, heads, columns;
  int token_stride, head_stride;
  const mx::array* norm = nullptr;  // the weight of an RMSNorm
  float eps = 0;
  mx::array* normed = nullptr;  // the norm is written to it, too
};

// Gives how many of the tokens' vectors share a read of a row.
int vectors(int tokens);

// Rows of `x`, one a token.
Vectors rows_of(const mx::array& x, mx::Dtype type);

// Encodes up to four products; `residual` is added to each.
void project(
    const mx::Stream& stream,
    const Vectors& vectors,
    const std::vector<Product>& products,
    const mx::array* residual = nullptr);

// Encodes a router's one product, whose rows are few and long.
void project_logits(
    const mx::Stream& stream,
    const Vectors& vectors,
    const Product& product);

// Encodes silu(gate x) * up x, which is written where `gate` says.
void project_swiglu(
    const mx::Stream& stream,
    const Vectors& vectors,
    const Product& gate,
    const Product& up);

}  // namespace glm_fused::metal
