// The attention half of a layer, in two nodes: what is computed before the
// caches are updated, and after.
#include "checks.h"
#include "ops/block.h"
#include "ops/block_inputs.h"

namespace glm_fused {

namespace {

mx::array project(
    const mx::array& x,
    Inputs& from,
    const FormatSpec* spec,
    mx::StreamOrDevice s) {
  return quantized_matvec(x, from.weight(spec), false, s);
}

// Returns columns [begin, end) of the last axis.
mx::array
columns(const mx::array& x, int begin, int end, mx::StreamOrDevice s) {
  mx::Shape first(x.ndim(), 0), last = x.shape();
  first.back() = begin;
  last.back() = end;
  return mx::slice(x, std::move(first), std::move(last), s);
}

// Returns x [b, l, heads * d] as [b, heads, l, d].
mx::array by_head(const mx::array& x, int heads, mx::StreamOrDevice s) {
  const int b = x.shape(0), l = x.shape(1);
  const mx::array split = mx::reshape(x, {b, l, heads, -1}, s);
  return mx::transpose(split, {0, 2, 1, 3}, s);
}

}  // namespace

Arrays attention_project(
    const mx::array& x,
    const AttentionProjections& p,
    const mx::array& cosines,
    const mx::array& sines,
    bool score,
    mx::StreamOrDevice s) {
  Arrays inputs = {x, cosines, sines};
  append(inputs, p.norm);
  append(inputs, p.q_a);
  append(inputs, p.q_a_norm);
  append(inputs, p.q_b);
  append(inputs, p.kv_a);
  append(inputs, p.kv_a_norm);
  append(inputs, p.embed_q);
  const auto& indexer = p.indexer;
  if (indexer) {
    append(inputs, indexer->wk);
    append(inputs, indexer->k_norm);
    inputs.push_back(indexer->k_norm_bias);
    append(inputs, indexer->wq_b);
    append(inputs, indexer->weights_proj);
  }
  struct Specs {
    const FormatSpec *q_a, *q_b, *kv_a, *embed_q, *wk, *wq_b, *weights_proj;
  };
  const Specs specs{
      p.q_a.spec,
      p.q_b.spec,
      p.kv_a.spec,
      p.embed_q.spec,
      indexer ? indexer->wk.spec : nullptr,
      indexer ? indexer->wq_b.spec : nullptr,
      indexer ? indexer->weights_proj.spec : nullptr};
  const float eps = p.norm.eps, q_eps = p.q_a_norm.eps,
              kv_eps = p.kv_a_norm.eps;
  const float k_eps = indexer ? indexer->k_norm.eps : 0;
  const int index_heads = indexer ? indexer->heads : 0;
  const bool interleaved = indexer && indexer->interleaved;
  const int heads = p.embed_q.rows().shape(0);
  const int rank = p.embed_q.rows().shape(1), nope = p.nope_dim;
  const auto chain = [=](const Arrays& all) -> Arrays {
    Inputs from(all);
    const mx::array &in = from.array(), &cos = from.array();
    const mx::array& sin = from.array();
    const mx::array h = rms_norm(in, from.array(), eps, false, s);
    const mx::array q_a = project(h, from, specs.q_a, s);
    const mx::array latent = rms_norm(q_a, from.array(), q_eps, false, s);
    const mx::array q = by_head(project(latent, from, specs.q_b, s), heads, s);
    const mx::array kv = mx::expand_dims(project(h, from, specs.kv_a, s), 1, s);
    const mx::array latents =
        rms_norm(columns(kv, 0, rank, s), from.array(), kv_eps, false, s);
    const mx::array k_pe =
        rotate(columns(kv, rank, kv.shape(-1), s), cos, sin, true, false, s);
    const mx::array embedded =
        project(columns(q, 0, nope, s), from, specs.embed_q, s);
    const mx::array q_pe =
        rotate(columns(q, nope, q.shape(-1), s), cos, sin, true, false, s);
    const mx::array queries = mx::contiguous(
        mx::transpose(
            mx::concatenate({embedded, q_pe}, -1, s), {0, 2, 1, 3}, s),
        false,
        s);
    Arrays out = {queries, latents, k_pe};
    if (index_heads == 0) {
      return out;
    }
    const mx::array k = project(h, from, specs.wk, s);
    const mx::array& k_weight = from.array();
    const mx::array& k_bias = from.array();
    const mx::array k_normed = layer_norm(k, k_weight, k_bias, k_eps, false, s);
    out.push_back(rotate(
        mx::expand_dims(k_normed, 1, s), cos, sin, interleaved, false, s));
    if (!score) {
      return out;
    }
    const mx::array index_q =
        by_head(project(latent, from, specs.wq_b, s), index_heads, s);
    const mx::array rotated = rotate(index_q, cos, sin, interleaved, false, s);
    out.push_back(
        mx::contiguous(mx::transpose(rotated, {0, 2, 1, 3}, s), false, s));
    out.push_back(
        project(mx::astype(h, mx::float32, s), from, specs.weights_proj, s));
    return out;
  };
  Key key = {heads, rank, nope, index_heads, interleaved, score};
  for (const FormatSpec* spec :
       {specs.q_a,
        specs.q_b,
        specs.kv_a,
        specs.embed_q,
        specs.wk,
        specs.wq_b,
        specs.weights_proj}) {
    key.push_back(key_of(spec));
  }
  for (float value : {eps, q_eps, kv_eps, k_eps}) {
    key.push_back(key_of(value));
  }
  return block("AttentionProject", key, chain, inputs, s);
}

mx::array attention_output(
    const mx::array& x,
    const mx::array& attended,
    const Weight& unembed_out,
    const Weight& o_proj,
    mx::StreamOrDevice s) {
  Arrays inputs = {x, attended};
  append(inputs, unembed_out);
  append(inputs, o_proj);
  const auto chain = [unembed = unembed_out.spec, o = o_proj.spec, s](
                         const Arrays& all) -> Arrays {
    Inputs from(all);
    const mx::array &in = from.array(), &found = from.array();
    const mx::array heads =
        mx::transpose(mx::astype(found, in.dtype(), s), {0, 2, 1, 3}, s);
    const mx::array values = project(heads, from, unembed, s);
    const mx::array rows = mx::reshape(
        mx::transpose(values, {0, 2, 1, 3}, s),
        {in.shape(0), in.shape(1), -1},
        s);
    return {residual_add(in, project(rows, from, o, s), s)};
  };
  const Key key = {key_of(unembed_out.spec), key_of(o_proj.spec)};
  return block("AttentionOutput", key, chain, inputs, s)[0];
}

}  // namespace glm_fused
