#include "ops/metal_blocks.h"

#include <stdexcept>

#include "metal/limits.h"
#include "mlx/transforms.h"
#include "ops/block_inputs.h"
#include "ops/check_rows.h"
#include "ops/placement.h"

namespace glm_fused {

namespace {

// Returns the outputs of a CPU's block as those of a node on Metal. The block
// has checked its arguments; it is not evaluated.
template <class Block, class... Settings>
Arrays on_metal(
    const Arrays& block,
    mx::StreamOrDevice s,
    const Settings&... settings) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const mx::array& output : block) {
    shapes.push_back(output.shape());
    dtypes.push_back(output.dtype());
  }
  Arrays inputs;
  for (const mx::array& input : block[0].inputs()) {
    inputs.push_back(in_rows(input, s));
  }
  return mx::array::make_arrays(
      std::move(shapes),
      dtypes,
      place(
          std::make_shared<Block>(
              mx::to_stream(s), block[0].primitive_ptr(), settings...)),
      inputs);
}

Format format_of(const Weight& w, int k) {
  return check_weight("block", "w", w, static_cast<int>(w.rows().ndim()), k);
}

MlpFormats formats_of(const Mlp& mlp, int hidden) {
  return {
      format_of(mlp.gate, hidden),
      format_of(mlp.up, hidden),
      format_of(mlp.down, mlp.gate.rows().shape(-2))};
}

}  // namespace

void MetalBlock::eval_cpu(const Arrays&, Arrays&) {
  throw std::runtime_error(std::string("[block] ") + name() + " is on Metal.");
}

Arrays metal_attention_project(
    const mx::array& x,
    const AttentionProjections& p,
    const mx::array& cosines,
    const mx::array& sines,
    bool score,
    mx::StreamOrDevice s) {
  const Arrays block =
      attention_project(x, p, cosines, sines, score, mx::Device::cpu);
  const int hidden = x.shape(-1), q_rank = p.q_a.rows().shape(0);
  const int heads = p.embed_q.rows().shape(0);
  AttentionFormats formats{
      format_of(p.q_a, hidden),
      format_of(p.q_b, q_rank),
      format_of(p.kv_a, hidden),
      format_of(p.embed_q, p.nope_dim),
      {},
      {},
      {}};
  AttentionSizes sizes{
      heads,
      p.nope_dim,
      block[1].shape(-1),
      block[2].shape(-1),
      0,
      0,
      false,
      p.norm.eps,
      p.q_a_norm.eps,
      p.kv_a_norm.eps,
      0};
  if (const auto& indexer = p.indexer) {
    formats.wk = format_of(indexer->wk, hidden);
    formats.wq_b = format_of(indexer->wq_b, q_rank);
    formats.weights_proj = format_of(indexer->weights_proj, hidden);
    sizes.index_heads = score ? indexer->heads : 0;
    sizes.index_dim = block[3].shape(-1);
    sizes.interleaved = indexer->interleaved;
    sizes.index_eps = indexer->k_norm.eps;
  }
  return on_metal<MetalAttentionProject>(block, s, formats, sizes);
}

mx::array metal_attention_output(
    const mx::array& x,
    const mx::array& attended,
    const Weight& unembed_out,
    const Weight& o_proj,
    mx::StreamOrDevice s) {
  const Arrays block = {
      attention_output(x, attended, unembed_out, o_proj, mx::Device::cpu)};
  const int values = unembed_out.rows().shape(0) * unembed_out.rows().shape(-2);
  return on_metal<MetalAttentionOutput>(
      block,
      s,
      format_of(unembed_out, attended.shape(-1)),
      format_of(o_proj, values))[0];
}

Arrays MetalAttend::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  Arrays chosen;
  for (int i : argnums) {
    chosen.push_back(primals[i]);
  }
  const auto given = [&](const Arrays& values) {
    Arrays all = primals;
    for (size_t i = 0; i < argnums.size(); i++) {
      all[argnums[i]] = values[i];
    }
    return chain_(all);
  };
  return mx::vjp(given, chosen, cotangents).second;
}

mx::array metal_attend(
    const mx::array& x,
    const mx::array& q,
    const mx::array& latents,
    const std::optional<mx::array>& ropes,
    const std::optional<mx::array>& selected,
    const Weight& unembed_out,
    const Weight& o_proj,
    int rank,
    float scale,
    const std::optional<mx::array>& start,
    mx::StreamOrDevice s) {
  // It checks its arguments and prepares its inputs; it is evaluated only where
  // what follows does not fit.
  const mx::array attended = sparse_mla_decode(
      q, latents, ropes, selected, rank, scale, start, false, false, s);
  const int listed = selected ? selected->shape(2) : latents.shape(1);
  if (!metal::unembed_vectors(1, listed, rank, x.itemsize())) {
    return metal_attention_output(x, attended, unembed_out, o_proj, s);
  }
  const mx::array output =
      attention_output(x, attended, unembed_out, o_proj, mx::Device::cpu);
  const Attention attention{
      check_rows(
          "sparse_mla_decode",
          "latents",
          latents,
          q.shape(0),
          rank,
          q.shape(3) - rank),
      scale,
      ropes.has_value(),
      selected.has_value()};
  const auto chain = [=, unembed = unembed_out.spec, o = o_proj.spec](
                         const Arrays& all) -> Arrays {
    Inputs from(all);
    const mx::array &x = from.array(), &q = from.array();
    const mx::array &start = from.array(), &latents = from.array();
    std::optional<mx::array> ropes, selected;
    if (attention.ropes) {
      ropes = from.array();
    }
    if (attention.selected) {
      selected = from.array();
    }
    const mx::Device cpu(mx::Device::cpu);
    const mx::array attended = sparse_mla_decode(
        q, latents, ropes, selected, rank, scale, start, false, false, cpu);
    const Weight values = from.weight(unembed);
    return {attention_output(x, attended, values, from.weight(o), cpu)};
  };
  Arrays inputs = {in_rows(x, s)};
  const Arrays& more = attended.inputs();
  inputs.insert(inputs.end(), more.begin(), more.end());
  append_arrays(inputs, unembed_out, s);
  append_arrays(inputs, o_proj, s);
  const int values = unembed_out.rows().shape(0) * unembed_out.rows().shape(-2);
  return mx::array(
      output.shape(),
      output.dtype(),
      place(
          std::make_shared<MetalAttend>(
              mx::to_stream(s),
              output.primitive_ptr(),
              chain,
              attention,
              format_of(unembed_out, rank),
              format_of(o_proj, values))),
      std::move(inputs));
}

mx::array metal_mlp_block(
    const mx::array& x,
    const Norm& norm,
    const Mlp& weights,
    mx::StreamOrDevice s) {
  const Arrays block = {mlp_block(x, norm, weights, mx::Device::cpu)};
  return on_metal<MetalMlpBlock>(
      block, s, formats_of(weights, x.shape(-1)), norm.eps)[0];
}

mx::array metal_moe_block(
    const mx::array& x,
    const Norm& norm,
    const Router& router,
    const Mlp& experts,
    const std::optional<Mlp>& shared,
    mx::StreamOrDevice s) {
  const Arrays block = {
      moe_block(x, norm, router, experts, shared, mx::Device::cpu)};
  const int hidden = x.shape(-1);
  return on_metal<MetalMoeBlock>(
      block,
      s,
      formats_of(experts, hidden),
      shared ? std::optional(formats_of(*shared, hidden)) : std::nullopt,
      router.routing,
      norm.eps)[0];
}

void MetalStreamedMoe::eval_cpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[block] StreamedMoe is on Metal.");
}

mx::array metal_streamed_moe(
    const mx::array& x,
    const Norm& norm,
    const Router& router,
    const Mlp& experts,
    const std::optional<Mlp>& shared,
    const std::shared_ptr<Arrivals>& arrivals,
    const std::optional<mx::array>& last,
    mx::StreamOrDevice s) {
  // These ops check the arguments and are not evaluated.
  const mx::Device cpu(mx::Device::cpu);
  const int hidden = x.shape(-1);
  const mx::array h = mx::reshape(
      rms_norm(x, norm.weight, norm.eps, false, cpu), {-1, hidden}, cpu);
  const auto [chosen, scores] = router_topk(
      h, router.weight, router.correction_bias, router.routing, false, cpu);
  const auto& [gate, up, down] = experts;
  moe_decode(h, gate, up, down, chosen, scores, false, false, arrivals, cpu);
  Arrays inputs = {
      in_rows(x, s),
      in_rows(norm.weight, s),
      in_rows(router.weight, s),
      in_rows(mx::astype(router.correction_bias, mx::float32, s), s)};
  const auto append = [&](const Mlp& mlp) {
    append_arrays(inputs, mlp.gate, s);
    append_arrays(inputs, mlp.up, s);
    append_arrays(inputs, mlp.down, s);
    return formats_of(mlp, hidden);
  };
  const MlpFormats routed_formats = append(experts);
  std::optional<MlpFormats> shared_formats;
  if (shared) {
    mlp_block(x, norm, *shared, cpu);
    shared_formats = append(*shared);
  }
  if (last) {
    inputs.push_back(*last);
  }
  return mx::array(
      x.shape(),
      x.dtype(),
      place(
          std::make_shared<MetalStreamedMoe>(
              mx::to_stream(s),
              routed_formats,
              shared_formats,
              router.routing,
              norm.eps,
              arrivals)),
      std::move(inputs));
}

}  // namespace glm_fused
