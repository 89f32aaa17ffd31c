// The MLP half of a layer: norm, dense MLP or experts, residual.
#include "checks.h"
#include "ops/block.h"
#include "ops/block_inputs.h"
#include "primitives.h"

namespace glm_fused {

namespace {

void append(Arrays& inputs, const Mlp& mlp) {
  append(inputs, mlp.gate);
  append(inputs, mlp.up);
  append(inputs, mlp.down);
}

struct MlpSpec {
  const FormatSpec *gate, *up, *down;

  explicit MlpSpec(const Mlp& mlp)
      : gate(mlp.gate.spec), up(mlp.up.spec), down(mlp.down.spec) {}

  void append_to(Key& key) const {
    key.insert(key.end(), {key_of(gate), key_of(up), key_of(down)});
  }

  Mlp of(Inputs& inputs) const {
    Weight g = inputs.weight(gate), u = inputs.weight(up);
    return {std::move(g), std::move(u), inputs.weight(down)};
  }
};

mx::array mlp(const mx::array& x, const Mlp& w, mx::StreamOrDevice s) {
  const mx::array gate = quantized_matvec(x, w.gate, false, s);
  const mx::array up = quantized_matvec(x, w.up, false, s);
  return quantized_matvec(swiglu(gate, up, s), w.down, false, s);
}

void check_mlp(const std::string& op, const std::string& name, const Mlp& w) {
  check_planes(op, name + "gate", w.gate);
  check_planes(op, name + "up", w.up);
  check_planes(op, name + "down", w.down);
}

}  // namespace

mx::array mlp_block(
    const mx::array& x,
    const Norm& norm,
    const Mlp& weights,
    mx::StreamOrDevice s) {
  check_mlp("mlp_block", "", weights);
  Arrays inputs = {x, norm.weight};
  append(inputs, weights);
  const MlpSpec spec(weights);
  Key key = {key_of(norm.eps)};
  spec.append_to(key);
  const auto chain = [eps = norm.eps, spec, s](const Arrays& all) -> Arrays {
    Inputs from(all);
    const mx::array& in = from.array();
    const mx::array h = rms_norm(in, from.array(), eps, false, s);
    return {residual_add(in, mlp(h, spec.of(from), s), s)};
  };
  return block("MlpBlock", key, chain, inputs, s)[0];
}

mx::array moe_block(
    const mx::array& x,
    const Norm& norm,
    const Router& router,
    const Mlp& experts,
    const std::optional<Mlp>& shared,
    mx::StreamOrDevice s) {
  check_mlp("moe_block", "", experts);
  // moe_decode would look at the slots before they are there.
  const mx::array& bank = experts.gate.rows();
  if (router.weight.ndim() != 2 || bank.ndim() != 3 ||
      router.weight.shape(0) > bank.shape(0)) {
    invalid(
        "moe_block",
        "router must be [experts, hidden] for at most as many experts as gate "
        "has, but has shape ",
        shape_of(router.weight),
        " and gate ",
        shape_of(bank),
        ".");
  }
  const mx::array bias = mx::astype(router.correction_bias, mx::float32, s);
  Arrays inputs = {x, norm.weight, router.weight, bias};
  append(inputs, experts);
  std::optional<MlpSpec> shared_spec;
  if (shared) {
    check_mlp("moe_block", "shared_", *shared);
    append(inputs, *shared);
    shared_spec.emplace(*shared);
  }
  const MlpSpec spec(experts);
  const Routing& r = router.routing;
  Key key = {
      key_of(norm.eps),
      r.top_k,
      r.n_group,
      r.topk_group,
      r.norm_topk_prob,
      key_of(r.routed_scaling_factor)};
  spec.append_to(key);
  if (shared_spec) {
    shared_spec->append_to(key);
  }
  const auto chain = [eps = norm.eps, routing = r, spec, shared_spec, s](
                         const Arrays& all) -> Arrays {
    Inputs from(all);
    const mx::array& in = from.array();
    const mx::array normed = rms_norm(in, from.array(), eps, false, s);
    const mx::array h = mx::reshape(normed, {-1, in.shape(-1)}, s);
    const mx::array& weight = from.array();
    const mx::array& bias = from.array();
    const auto [slots, scores] =
        router_topk(h, weight, bias, routing, false, s);
    const Mlp e = spec.of(from);
    mx::array y = moe_decode(
        h, e.gate, e.up, e.down, slots, scores, false, false, nullptr, s);
    if (shared_spec) {
      y = residual_add(y, mlp(h, shared_spec->of(from), s), s);
    }
    return {residual_add(in, mx::reshape(y, in.shape(), s), s)};
  };
  return block("MoeBlock", key, chain, inputs, s)[0];
}

}  // namespace glm_fused
