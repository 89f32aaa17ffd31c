// The MLP half of a layer with experts, which are in memory or streamed.
#include <future>
#include <memory>
#include <optional>

#include "metal/block_inputs.h"
#include "ops/metal_blocks.h"

namespace glm_fused {

namespace {

using metal::allocate;
using metal::in_rows;
using metal::Inputs;
using metal::MlpWeights;
using metal::Product;

// What is computed of x before its experts are known.
struct Routed {
  mx::array h;       // the normed rows, [tokens, hidden]
  mx::array chosen;  // experts, int32 [tokens, top_k]
  mx::array shares;  // float32 [tokens, top_k]
};

// Encodes norm and router.
Routed encode_route(
    const mx::Stream& stream,
    const mx::array& x,
    Inputs& from,
    const Routing& routing,
    float eps) {
  const mx::array &norm = from.array(), &router = from.array();
  const mx::array& bias = from.array();
  const int tokens = static_cast<int>(x.size() / x.shape(-1));
  metal::Encoder encoder(stream);
  const auto temporary = [&](int columns, mx::Dtype dtype) {
    auto made = metal::allocate({tokens, columns}, dtype);
    encoder.add_temporary(made);
    return made;
  };
  Routed made{
      temporary(x.shape(-1), x.dtype()),
      temporary(routing.top_k, mx::int32),
      temporary(routing.top_k, mx::float32)};
  auto logits = temporary(router.shape(0), mx::float32);
  metal::Vectors vectors = metal::rows_of(x, x.dtype());
  vectors.norm = &norm;
  vectors.eps = eps;
  vectors.normed = &made.h;
  const Format format = dense_format(float_type_of(router.dtype()));
  Product product = in_rows(&router, format, logits);
  product.wide = true;
  metal::project_logits(stream, vectors, product);
  metal::choose(stream, logits, bias, routing, made.chosen, made.shares);
  return made;
}

// Encodes the part of shared experts that needs no other: silu(gate h) * up h.
mx::array encode_shared(
    const mx::Stream& stream,
    const mx::array& h,
    const MlpWeights& shared) {
  const int tokens = h.shape(0), width = shared.gate->shape(0);
  auto act = metal::allocate({tokens, width}, h.dtype());
  metal::project_swiglu(
      stream,
      metal::rows_of(h, h.dtype()),
      in_rows(shared.gate, shared.formats.gate, act),
      in_rows(shared.up, shared.formats.up, act));
  return act;
}

// Returns the slots of experts that are known by now, filled. They are held as
// long as the array's memory is.
mx::array fill_slots(
    const std::shared_ptr<Arrivals>& arrivals,
    const mx::array& chosen) {
  mx::array slots(chosen.shape(), mx::int32, nullptr, {});
  slots.set_data(
      mx::array::Data(
          mx::allocator::allocator().malloc(slots.nbytes()),
          [arrivals](mx::allocator::Buffer buffer) {
            arrivals->end();
            mx::allocator::allocator().free(buffer);
          }));
  arrivals->fill(
      chosen.data<int32_t>(),
      chosen.shape(0),
      chosen.shape(1),
      slots.data<int32_t>());
  return slots;
}

// A layer's norm and router, which are encoded, and its experts.
struct Layer {
  const mx::array& x;
  const Routed made;
  const MlpWeights routed;
  const std::optional<MlpWeights> shared;

  Layer(
      const mx::Stream& stream,
      Inputs from,
      const MlpFormats& experts,
      const std::optional<MlpFormats>& shared_experts,
      const Routing& routing,
      float eps)
      : x(from.array()),
        made(encode_route(stream, x, from, routing, eps)),
        routed(from.mlp(experts)),
        shared(
            shared_experts ? std::optional(from.mlp(*shared_experts))
                           : std::nullopt) {}

  // Encodes the experts; `act` is that of the shared ones, if it is known.
  void encode_experts(
      const mx::Stream& stream,
      const mx::array& slots,
      mx::array& y,
      const mx::array* act = nullptr) const {
    metal::experts(
        stream,
        made.h,
        slots,
        made.shares,
        routed,
        shared ? &*shared : nullptr,
        &x,
        y,
        act);
  }
};

}  // namespace

void MetalMoeBlock::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!allocate(outputs)) {
    return;
  }
  const Layer layer(
      stream(), Inputs(inputs), experts_, shared_, routing_, eps_);
  layer.encode_experts(stream(), layer.made.chosen, outputs[0]);
}

void MetalStreamedMoe::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!allocate(outputs)) {
    return;
  }
  const Layer layer(
      stream(), Inputs(inputs), experts_, shared_, routing_, eps_);
  const Routed& made = layer.made;
  metal::Encoder encoder(stream());
  const auto known = std::make_shared<std::promise<void>>();
  encoder.begin([known] { known->set_value(); });
  std::optional<mx::array> act;
  if (layer.shared) {
    act = encode_shared(stream(), made.h, *layer.shared);
    encoder.begin();
  }
  auto slots = made.chosen;
  if (!encoder.rehearses()) {
    known->get_future().wait();
    slots = fill_slots(arrivals_, made.chosen);
  }
  layer.encode_experts(stream(), slots, outputs[0], act ? &*act : nullptr);
  // These were temporaries of what the GPU has begun.
  encoder.add_temporaries({made.h, made.shares, slots});
  if (act) {
    encoder.add_temporary(*act);
  }
}

}  // namespace glm_fused
