#include <algorithm>

#include "metal/attend.h"
#include "metal/block_inputs.h"
#include "metal/experts.h"
#include "metal/limits.h"
#include "metal/params.h"
#include "metal/project.h"
#include "metal/source.h"
#include "ops/metal_blocks.h"
#include "view.h"

namespace glm_fused {

namespace {

using metal::allocate;
using metal::in_rows;
using metal::Inputs;
using metal::MlpWeights;
using metal::Product;

// What attention's last launch before the caches reads.
struct QueryInputs {
  const mx::array *q, *embed_q, *kv, *kv_norm, *cosines, *sines;
  const mx::array *index_k, *k_norm, *k_bias, *index_q;
};

void encode_queries(
    const mx::Stream& stream,
    const Format& format,
    const AttentionSizes& z,
    const QueryInputs& in,
    std::vector<mx::array>& outputs) {
  metal::Encoder encoder(stream);
  const metal::Tiles& tiles = encoder.tiles();
  const int tokens = in.q->shape(0), width = metal::vectors(tokens);
  auto* kernel = encoder.kernel(
      {metal_source::attention_queries,
       "attention_queries",
       {in.q->dtype(),
        in.kv_norm->dtype(),
        in.k_norm->dtype(),
        in.k_bias->dtype(),
        tiles.rows,
        width,
        metal::Argument::row(format, z.rank, z.nope)}});
  const int simdgroups = metal::simdgroups(kernel, tiles.gate_up);
  const int row_width = z.rank + z.rope;
  const AttentionParams params{
      tokens,
      z.heads,
      z.nope,
      z.rank,
      z.rope,
      z.index_heads,
      z.index_dim,
      z.interleaved,
      1 + z.heads + (z.index_dim > 0) + z.index_heads,
      metal::blocks(z.rank, tiles.rows * simdgroups),
      z.kv_eps,
      z.index_eps,
      {0, z.rank, z.heads * row_width, row_width, false},
      view_of(*in.cosines),
      view_of(*in.sines)};
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_input_array(*in.q, 0);
  metal::bind_weight(encoder, in.embed_q, format, 1);
  int index = 4;
  for (const mx::array* input :
       {in.kv,
        in.kv_norm,
        in.cosines,
        in.sines,
        in.index_k,
        in.k_norm,
        in.k_bias,
        in.index_q}) {
    encoder.set_input_array(*input, index++);
  }
  for (size_t i = 0; i < 5; i++) {
    if (i < outputs.size()) {
      encoder.set_output_array(outputs[i], index++);
    } else {
      encoder.set_input_array(*in.kv, index++);  // never touched
    }
  }
  encoder.set_bytes(params, index);
  const int row_groups =
      metal::blocks(params.rows * std::min(tokens, width), simdgroups);
  encoder.dispatch_threadgroups(
      MTL::Size(
          params.head_groups * z.heads + row_groups,
          metal::blocks(tokens, width),
          1),
      MTL::Size(32, simdgroups, 1));
}

}  // namespace

void MetalAttentionProject::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!allocate(outputs)) {
    return;
  }
  const AttentionFormats& f = formats_;
  const AttentionSizes& z = sizes_;
  Inputs from(inputs);
  const mx::array &x = from.array(), &cosines = from.array();
  const mx::array &sines = from.array(), &norm = from.array();
  const auto* q_a = from.planes(f.q_a);
  const mx::array& q_norm = from.array();
  const auto* q_b = from.planes(f.q_b);
  const auto* kv_a = from.planes(f.kv_a);
  const mx::array& kv_norm = from.array();
  const auto* embed_q = from.planes(f.embed_q);
  const bool full = z.index_dim > 0, scores = z.index_heads > 0;
  const auto* wk = full ? from.planes(f.wk) : nullptr;
  const mx::array& k_norm = full ? from.array() : kv_norm;
  const mx::array& k_bias = full ? from.array() : kv_norm;
  const auto* wq_b = full ? from.planes(f.wq_b) : nullptr;
  const auto* weights_proj = full ? from.planes(f.weights_proj) : nullptr;

  metal::Encoder encoder(stream());
  const int tokens = static_cast<int>(x.size() / x.shape(-1));
  const auto temporary = [&](int columns) {
    auto made = metal::allocate({tokens, columns}, x.dtype());
    encoder.add_temporary(made);
    return made;
  };
  auto q_latent = temporary(q_a->shape(0)), kv = temporary(z.rank + z.rope);
  auto q = temporary(q_b->shape(0));
  std::vector<Product> products = {
      in_rows(q_a, f.q_a, q_latent), in_rows(kv_a, f.kv_a, kv)};
  auto index_k = full ? temporary(z.index_dim) : kv;
  if (full) {
    products.push_back(in_rows(wk, f.wk, index_k));
  }
  if (scores) {
    products.push_back(in_rows(weights_proj, f.weights_proj, outputs[5]));
    products.back().wide = true;
  }
  metal::Vectors vectors = metal::rows_of(x, x.dtype());
  vectors.norm = &norm;
  vectors.eps = z.eps;
  metal::project(stream(), vectors, products);

  products = {in_rows(q_b, f.q_b, q)};
  auto index_q = scores ? temporary(wq_b->shape(0)) : q;
  if (scores) {
    products.push_back(in_rows(wq_b, f.wq_b, index_q));
  }
  metal::Vectors latent = metal::rows_of(q_latent, x.dtype());
  latent.norm = &q_norm;
  latent.eps = z.q_eps;
  metal::project(stream(), latent, products);

  encode_queries(
      stream(),
      f.embed_q,
      z,
      {&q,
       embed_q,
       &kv,
       &kv_norm,
       &cosines,
       &sines,
       &index_k,
       &k_norm,
       &k_bias,
       &index_q},
      outputs);
}

void MetalAttentionOutput::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!allocate(outputs)) {
    return;
  }
  Inputs from(inputs);
  const mx::array &x = from.array(), &attended = from.array();
  const auto* unembed_out = from.planes(unembed_out_);
  const auto* o_proj = from.planes(o_proj_);
  const int tokens = static_cast<int>(x.size() / x.shape(-1));
  const int heads = attended.shape(2), rank = attended.shape(3);
  const int values = unembed_out->shape(1);
  auto rows = metal::allocate({tokens, heads * values}, x.dtype());
  metal::Encoder(stream()).add_temporary(rows);
  metal::project(
      stream(),
      {attended, x.dtype(), tokens, heads, rank, heads * rank, rank},
      {{unembed_out, &unembed_out_, &rows, heads * values, values}});
  metal::project(
      stream(),
      metal::rows_of(rows, x.dtype()),
      {in_rows(o_proj, o_proj_, outputs[0])},
      &x);
}

void MetalAttend::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!allocate(outputs)) {
    return;
  }
  Inputs from(inputs);
  const mx::array &x = from.array(), &q = from.array();
  const mx::array &start = from.array(), &latents = from.array();
  const mx::array* ropes = attention_.ropes ? &from.array() : nullptr;
  const mx::array* selected = attention_.selected ? &from.array() : nullptr;
  const auto* unembed_out = from.planes(unembed_out_);
  const auto* o_proj = from.planes(o_proj_);
  metal::Encoder encoder(stream());
  const metal::Tiles& tiles = encoder.tiles();
  const int all = q.shape(0) * q.shape(1), heads = q.shape(2);
  const int rank = attention_.layout.rank, values = unembed_out->shape(1);
  const int listed = selected ? selected->shape(2) : latents.shape(1);
  const int width = metal::unembed_vectors(all, listed, rank, x.itemsize());
  auto rows = metal::allocate({all, heads * values}, x.dtype());
  encoder.add_temporary(rows);
  auto* unembed = encoder.kernel(
      {metal_source::mla_unembed,
       "mla_unembed",
       {x.dtype(),
        tiles.rows,
        width,
        metal::Argument::row(unembed_out_, values, rank)}});
  const int wanted =
      std::max(metal::blocks(values, tiles.rows), metal::blocks(rank, 32));
  const int simdgroups = metal::simdgroups(unembed, std::min(wanted, 32));
  const auto combine = [&](const mx::array& o,
                           const mx::array& m,
                           const mx::array& l,
                           const MlaParams& mla,
                           int tokens) {
    const UnembedParams params{
        mla, tokens, {0, values, heads * values, values, false}};
    encoder.set_compute_pipeline_state(unembed);
    encoder.set_input_array(o, 0);
    encoder.set_input_array(m, 1);
    encoder.set_input_array(l, 2);
    metal::bind_weight(encoder, unembed_out, unembed_out_, 3);
    encoder.set_output_array(rows, 6);
    encoder.set_bytes(params, 7);
    encoder.set_threadgroup_memory_length(
        metal::threadgroup_bytes(mla.splits), 0);
    encoder.set_threadgroup_memory_length(
        metal::threadgroup_bytes((width * rank * x.itemsize() + 3) / 4), 1);
    encoder.dispatch_threadgroups(
        MTL::Size(heads, metal::blocks(tokens, width), 1),
        MTL::Size(32, simdgroups, 1));
  };
  metal::attend(
      stream(),
      {q, start, latents, ropes, selected, attention_.layout, attention_.scale},
      combine);
  metal::project(
      stream(),
      metal::rows_of(rows, x.dtype()),
      {in_rows(o_proj, o_proj_, outputs[0])},
      &x);
}

void MetalMlpBlock::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!allocate(outputs)) {
    return;
  }
  Inputs from(inputs);
  const mx::array &x = from.array(), &norm = from.array();
  const MlpWeights w = from.mlp(formats_);
  const int tokens = static_cast<int>(x.size() / x.shape(-1));
  auto act = metal::allocate({tokens, w.gate->shape(0)}, x.dtype());
  metal::Encoder(stream()).add_temporary(act);
  metal::Vectors vectors = metal::rows_of(x, x.dtype());
  vectors.norm = &norm;
  vectors.eps = eps_;
  metal::project_swiglu(
      stream(),
      vectors,
      in_rows(w.gate, formats_.gate, act),
      in_rows(w.up, formats_.up, act));
  metal::project(
      stream(),
      metal::rows_of(act, x.dtype()),
      {in_rows(w.down, formats_.down, outputs[0])},
      &x);
}

}  // namespace glm_fused
