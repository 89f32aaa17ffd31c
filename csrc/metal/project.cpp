#include "metal/project.h"

#include <algorithm>
#include <bit>

#include "metal/params.h"
#include "metal/source.h"

namespace glm_fused::metal {

namespace {

constexpr int kMaxVectors = 16;  // tokens that share a read of a row
constexpr int kMaxProducts = 4;
constexpr int kPlanes = 3;  // the buffer of the first plane
constexpr int kOutputs = kPlanes + kMaxProducts * kMaxPlanes;
constexpr int kNormed = kOutputs + kMaxProducts;
constexpr int kLaneBytes = 128;  // a lane asks for so much of a router's row

// How a launch shares out its work.
struct Shares {
  int rows;  // of a simdgroup
  int simdgroups;
  int depth;  // blocks of columns that are read at once
};

struct Launch {
  const mx::Stream& stream;
  const Vectors& vectors;
  const std::vector<Product> products;
  const mx::array* residual = nullptr;
  bool pair = false;  // gate and up

  bool writes(int i) const {
    return i < static_cast<int>(products.size()) && (i == 0 || !pair);
  }

  // Rows of dense weights that begin at multiples of four values are read in
  // fours.
  Argument row(const Product& p) const {
    const mx::array& plane = *p.planes;
    const int k = vectors.columns;
    if (p.format->family() == Family::dense && k % 4 == 0 &&
        plane.offset() % (4 * plane.itemsize()) == 0) {
      return Argument::row_of_fours(plane.dtype());
    }
    return Argument::row(*p.format, p.rows(), k);
  }

  KernelName name(const Shares& shares, int width) const {
    const Vectors& v = vectors;
    KernelName name(
        metal_source::project,
        "project",
        {v.type,
         v.x.dtype(),
         (v.norm ? *v.norm : v.x).dtype(),
         v.norm != nullptr,
         pair,
         shares.rows,
         width,
         shares.depth,
         static_cast<int>(products.size())});
    for (const Product& p : products) {
      name.add(row(p));
    }
    return name;
  }

  void encode(const Shares& shares) const {
    const Vectors& v = vectors;
    const int width = metal::vectors(v.tokens);
    Encoder encoder(stream);
    auto* project = encoder.kernel(name(shares, width));
    const int simdgroups = metal::simdgroups(project, shares.simdgroups);
    ProjectParams params{
        v.tokens,
        v.columns,
        v.token_stride,
        v.head_stride,
        residual != nullptr,
        0,
        v.eps,
        {}};
    encoder.set_compute_pipeline_state(project);
    encoder.set_input_array(v.x, 0);
    encoder.set_input_array(v.norm ? *v.norm : v.x, 1);
    encoder.set_input_array(residual ? *residual : v.x, 2);
    for (int i = 0; i < kMaxProducts; i++) {
      // What a launch has fewer of is bound to something and never touched.
      const bool present = i < static_cast<int>(products.size());
      const Product& p = products[present ? i : 0];
      bind_weight(encoder, p.planes, *p.format, kPlanes + i * kMaxPlanes);
      params.products[i] = {
          params.groups, p.rows(), p.token_stride, p.head_stride, p.wide};
      if (writes(i)) {
        encoder.set_output_array(*p.y, kOutputs + i);
        params.groups += blocks(p.rows(), shares.rows * simdgroups);
      } else {
        encoder.set_input_array(v.x, kOutputs + i);
      }
    }
    if (v.normed) {
      encoder.set_output_array(*v.normed, kNormed);
    } else {
      encoder.set_input_array(v.x, kNormed);
    }
    encoder.set_bytes(params, kNormed + 1);
    encoder.dispatch_threadgroups(
        MTL::Size(
            params.groups + (v.normed ? 1 : 0),
            blocks(v.tokens, width),
            v.heads),
        MTL::Size(32, simdgroups, 1));
  }
};

// One launch's products have one number of rows.
Shares shares(const Launch& launch) {
  const Tiles& tiles = Encoder(launch.stream).tiles();
  int rows = 1;
  for (const Product& p : launch.products) {
    const int k = launch.vectors.columns;
    rows = std::max(rows, tiles.rows_of(*p.format, p.rows(), k));
  }
  return {rows, tiles.gate_up, 1};
}

}  // namespace

int vectors(int tokens) {
  return static_cast<int>(
      std::bit_ceil(static_cast<unsigned>(std::min(tokens, kMaxVectors))));
}

Vectors rows_of(const mx::array& x, mx::Dtype type) {
  const int columns = x.shape(-1);
  const int tokens = static_cast<int>(x.size() / columns);
  return {x, type, tokens, 1, columns, columns, 0};
}

void project(
    const mx::Stream& stream,
    const Vectors& vectors,
    const std::vector<Product>& products,
    const mx::array* residual) {
  const Launch launch{stream, vectors, products, residual};
  launch.encode(shares(launch));
}

void project_logits(
    const mx::Stream& stream,
    const Vectors& vectors,
    const Product& product) {
  const int cells = 4 * static_cast<int>(product.planes->itemsize());
  const Launch launch{stream, vectors, {product}};
  launch.encode({1, Encoder(stream).tiles().router, kLaneBytes / cells});
}

void project_swiglu(
    const mx::Stream& stream,
    const Vectors& vectors,
    const Product& gate,
    const Product& up) {
  const Launch launch{stream, vectors, {gate, up}, nullptr, true};
  launch.encode(shares(launch));
}

}  // namespace glm_fused::metal
