// The public operations. Shapes and dtypes are checked when the graph is
// built; every error names the op, the argument, what it is and what was
// expected.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "arrivals.h"
#include "formats/weight.h"
#include "mlx/mlx.h"

namespace glm_fused {

// Returns `tokens` [b, l], as int32 unless all are sure to be from 0 to
// vocabulary - 1; evaluation throws where one is not. It runs on the CPU alone.
mx::array check_tokens(
    const mx::array& tokens,
    int vocabulary,
    mx::StreamOrDevice s = {});

// A check of tokens that MLX computes already, in rows of `length`: it waits
// for them, and throws for the first one outside the vocabulary.
struct LateCheck {
  mx::array computed;
  int length, vocabulary;
  void operator()() const;
};

// Tokens for a decode step, int32 or uint32, and what is to be checked once the
// step is enqueued.
struct TokensOfStep {
  mx::array tokens;
  std::optional<LateCheck> late;
};

// Does as check_tokens does, but what MLX computes already is checked late: who
// decodes with one token on its way enqueues a step before its token is there,
// and to wait for it first would leave the stream without work.
TokensOfStep tokens_of_step(
    const mx::array& tokens,
    int vocabulary,
    mx::StreamOrDevice s = {});

// Returns y[..., m, n] = sum_k x[..., m, k] W[..., n, k], accumulated in fp32,
// in x's dtype. W is [n, k], or [h, n, k] with x [..., h, m, k].
mx::array quantized_matvec(
    const mx::array& x,
    const Weight& w,
    bool reference,
    mx::StreamOrDevice s = {});

// Returns [t, hidden]: the sum over i of scores[t, i] * down(silu(gate x) * up
// x), with each projection taken from slot slots[t, i]. With `prompt`, Metal
// groups tokens by slot, and the order of the sums is its matrix units'. With
// `arrivals`, which the fused path on the CPU alone takes, experts are computed
// as their slots are filled.
mx::array moe_decode(
    const mx::array& x,
    const Weight& gate,
    const Weight& up,
    const Weight& down,
    const mx::array& slots,
    const mx::array& scores,
    bool reference,
    bool prompt,
    const std::shared_ptr<Arrivals>& arrivals = nullptr,
    mx::StreamOrDevice s = {});

// Returns [t, top_k, n]: y[t, i] = W[slots[t, i]] x[t], rounded as in
// moe_decode. W is [slots, n, k], x [t, k], or [t, top_k, k] with a vector for
// each choice.
mx::array expert_matvec(
    const mx::array& x,
    const Weight& w,
    const mx::array& slots,
    bool reference,
    mx::StreamOrDevice s = {});

// These are the steps of moe_decode that MLX has no op for, rounded as there:
// with gather_qmm they are its unfused chain on a GPU.
mx::array
swiglu(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s = {});
// Returns [t, hidden]: the sum over i of scores[t, i] * y[t, i].
mx::array expert_sum(
    const mx::array& y,
    const mx::array& scores,
    mx::StreamOrDevice s = {});

// Returns x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype.
// The squares are summed in fp32 as a dense dot product of x with itself; x is
// rounded to its dtype after each product.
mx::array rms_norm(
    const mx::array& x,
    const mx::array& weight,
    float eps,
    bool reference,
    mx::StreamOrDevice s = {});

// Returns (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last
// axis, summed and rounded likewise.
mx::array layer_norm(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& bias,
    float eps,
    bool reference,
    mx::StreamOrDevice s = {});

// Returns x [b, h, l, d] with its leading columns rotated in fp32 by the angles
// that `cosines` and `sines` [b or 1, 1, l, pairs] belong to. Pairs of columns
// are (0, 1), (2, 3), … if `interleaved`, else (0, pairs), (1, pairs + 1), ….
mx::array rotate(
    const mx::array& x,
    const mx::array& cosines,
    const mx::array& sines,
    bool interleaved,
    bool reference,
    mx::StreamOrDevice s = {});

struct Routing {
  int top_k;
  int n_group;
  int topk_group;
  bool norm_topk_prob;
  float routed_scaling_factor;
};

// Returns experts int32 [t, top_k] and scores float32 [t, top_k] of sigmoid
// routing with a correction bias that chooses but does not weigh (DeepSeek-V3,
// "noaux_tc").
std::pair<mx::array, mx::array> router_topk(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& correction_bias,
    const Routing& routing,
    bool reference,
    mx::StreamOrDevice s = {});

// Returns the rows [.., hidden] of `table` that the tokens, int32 or uint32 and
// below its rows, take: those of mx.dequantize where it is affine, dense ones,
// or the float32 values of GGUF's blocks. On a CPU only; without gradient.
mx::array embed(
    const mx::array& tokens,
    const Weight& table,
    int hidden,
    mx::StreamOrDevice s = {});

// Returns the values float32 [.., n, k] of a weight in one of GGUF's formats,
// as ggml makes them. On a CPU only; without gradient.
mx::array gguf_values(const Weight& w);

// Returns x + y, arrays of one shape and dtype, rounded once.
mx::array
residual_add(const mx::array& x, const mx::array& y, mx::StreamOrDevice s = {});

// Returns zeros [batch, 1, capacity, width] for a cache, in huge pages where
// the system lets. On a CPU only.
mx::array cache_buffer(
    int batch,
    int capacity,
    int width,
    mx::Dtype dtype,
    mx::StreamOrDevice s = {});

// Writes `rows` [b, 1, l, width] to `buffer` [b, 1, capacity, width] from row
// `at` on. Returns the buffer and its first rows [b, at + l, width].
//
// The buffer's memory is written where it is, and stays valid for all who read
// the rows before `at`; it is copied only where its later rows may be those of
// another array. In what is returned, rows after at + l are unspecified.
std::pair<mx::array, mx::array> append_rows(
    const mx::array& buffer,
    const mx::array& rows,
    int at,
    mx::StreamOrDevice s = {});

// Appends to two buffers of one dtype, in one node. Returns both buffers, then
// their first rows.
std::vector<mx::array> append_pair(
    const mx::array& buffer,
    const mx::array& rows,
    const mx::array& other_buffer,
    const mx::array& other_rows,
    int at,
    mx::StreamOrDevice s = {});

// Packs `values` [b, 1, l, rank] and `ropes` [b, 1, l, rope], if there are any,
// to rows of the format that the buffer's type tells (row_layout.h), and
// appends them as append_rows does.
std::pair<mx::array, mx::array> append_packed(
    const mx::array& buffer,
    const mx::array& values,
    const std::optional<mx::array>& ropes,
    int at,
    mx::StreamOrDevice s = {});

struct Norm {
  mx::array weight;
  float eps;
};

// The weights of down(silu(gate x) * up x).
struct Mlp {
  Weight gate, up, down;
};

struct Router {
  mx::array weight;
  mx::array correction_bias;
  Routing routing;
};

// What attention computes of a token before the caches are updated. `k_norm`
// and what follows it are a full layer's.
struct IndexerProjections {
  Weight wk;
  Norm k_norm;
  mx::array k_norm_bias;
  Weight wq_b, weights_proj;
  int heads;
  bool interleaved;
};
struct AttentionProjections {
  Norm norm;
  Weight q_a;
  Norm q_a_norm;
  Weight q_b, kv_a;
  Norm kv_a_norm;
  Weight embed_q;
  int nope_dim;
  std::optional<IndexerProjections> indexer;
};

// Returns for x [b, l, hidden], as one node of a CPU stream: queries [b, l,
// heads, rank + rope], latents [b, 1, l, rank] and k_pe [b, 1, l, rope]; of a
// full layer the indexer's key [b, 1, l, dim], and if `score` its queries [b,
// l, heads, dim] and the weights of its heads [b, l, heads], float32.
std::vector<mx::array> attention_project(
    const mx::array& x,
    const AttentionProjections& projections,
    const mx::array& cosines,
    const mx::array& sines,
    bool score,
    mx::StreamOrDevice s = {});

// Returns x [b, l, hidden] + o_proj(unembed_out(attended)), as one node of a
// CPU stream; `attended` [b, l, heads, rank] is what sparse_mla_decode gives.
mx::array attention_output(
    const mx::array& x,
    const mx::array& attended,
    const Weight& unembed_out,
    const Weight& o_proj,
    mx::StreamOrDevice s = {});

// Returns x [b, l, hidden] + mlp(rms_norm(x)), as one node of a CPU stream.
mx::array mlp_block(
    const mx::array& x,
    const Norm& norm,
    const Mlp& weights,
    mx::StreamOrDevice s = {});

// Returns x [b, l, hidden] + (routed(h) + shared(h)) with h = rms_norm(x), as
// one node of a CPU stream. `experts` have a matrix for each expert.
mx::array moe_block(
    const mx::array& x,
    const Norm& norm,
    const Router& router,
    const Mlp& experts,
    const std::optional<Mlp>& shared,
    mx::StreamOrDevice s = {});

// Returns int32 [b, l, k]: the cached keys that each of the last l tokens
// attends to, ascending, then -1. q is [b, l, heads, dim], weights [b, l,
// heads], keys [b, t, dim] or packed (row_layout.h); `start` [b] is the first
// key that is no padding. Weights are multiplied by `weight_scale` first, in
// fp32. With `prompt`, Metal scores tiles of queries, and the order of the sums
// is its matrix units'.
mx::array indexer_topk(
    const mx::array& q,
    const mx::array& keys,
    const mx::array& weights,
    int k,
    float scale,
    float weight_scale,
    const std::optional<mx::array>& start,
    bool reference,
    bool prompt,
    mx::StreamOrDevice s = {});

// Returns float32 [b, l, heads, rank]: attention of the last l tokens over the
// cached rows that `selected` [b, l, k] names, or over all that they may see. q
// is [b, l, heads, rank + rope]; latents are [b, t, rank] with ropes [b, t,
// rope], or packed rows without. With `prompt`, Metal takes the queries one by
// one, and the order of the sums is its matrix units'.
mx::array sparse_mla_decode(
    const mx::array& q,
    const mx::array& latents,
    const std::optional<mx::array>& ropes,
    const std::optional<mx::array>& selected,
    int rank,
    float scale,
    const std::optional<mx::array>& start,
    bool reference,
    bool prompt,
    mx::StreamOrDevice s = {});

}  // namespace glm_fused
