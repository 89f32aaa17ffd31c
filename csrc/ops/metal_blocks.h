// The blocks of ops.h on a Metal stream: nodes that encode a few launches.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "ops.h"
#include "row_layout.h"

namespace glm_fused {

// A block that is evaluated on Metal. `chain` is the same block for a CPU; its
// inputs are this one's, and its gradients, too.
class MetalBlock : public mx::Primitive {
 public:
  MetalBlock(mx::Stream stream, std::shared_ptr<mx::Primitive> chain)
      : mx::Primitive(stream), chain_(std::move(chain)) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&)
      override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override {
    return chain_->vjp(primals, cotangents, argnums, outputs);
  }
  const char* name() const override {
    return chain_->name();
  }

 private:
  std::shared_ptr<mx::Primitive> chain_;
};

struct AttentionFormats {
  Format q_a, q_b, kv_a, embed_q;
  // Of the indexer, if there is one.
  Format wk, wq_b, weights_proj;
};
struct AttentionSizes {
  int heads, nope, rank, rope;
  int index_heads, index_dim;  // 0 where there is no indexer
  bool interleaved;            // of the indexer
  float eps, q_eps, kv_eps, index_eps;
};

class MetalAttentionProject : public MetalBlock {
 public:
  MetalAttentionProject(
      mx::Stream stream,
      std::shared_ptr<mx::Primitive> chain,
      AttentionFormats formats,
      AttentionSizes sizes)
      : MetalBlock(stream, std::move(chain)),
        formats_(formats),
        sizes_(sizes) {}
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

 private:
  AttentionFormats formats_;
  AttentionSizes sizes_;
};

class MetalAttentionOutput : public MetalBlock {
 public:
  MetalAttentionOutput(
      mx::Stream stream,
      std::shared_ptr<mx::Primitive> chain,
      Format unembed_out,
      Format o_proj)
      : MetalBlock(stream, std::move(chain)),
        unembed_out_(unembed_out),
        o_proj_(o_proj) {}
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

 private:
  Format unembed_out_, o_proj_;
};

struct Attention {
  RowLayout layout;
  float scale;
  bool ropes, selected;  // whether they are inputs
};

// inputs: x, those of SparseMlaDecode, the arrays of unembed_out and o_proj.
class MetalAttend : public MetalBlock {
 public:
  using Chain =
      std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

  MetalAttend(
      mx::Stream stream,
      std::shared_ptr<mx::Primitive> output,
      Chain chain,
      Attention attention,
      Format unembed_out,
      Format o_proj)
      : MetalBlock(stream, std::move(output)),
        chain_(std::move(chain)),
        attention_(attention),
        unembed_out_(unembed_out),
        o_proj_(o_proj) {}
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;

 private:
  Chain chain_;  // of the same inputs, for a CPU
  Attention attention_;
  Format unembed_out_, o_proj_;
};

struct MlpFormats {
  Format gate, up, down;
};

class MetalMlpBlock : public MetalBlock {
 public:
  MetalMlpBlock(
      mx::Stream stream,
      std::shared_ptr<mx::Primitive> chain,
      MlpFormats formats,
      float eps)
      : MetalBlock(stream, std::move(chain)), formats_(formats), eps_(eps) {}
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

 private:
  MlpFormats formats_;
  float eps_;
};

class MetalMoeBlock : public MetalBlock {
 public:
  MetalMoeBlock(
      mx::Stream stream,
      std::shared_ptr<mx::Primitive> chain,
      MlpFormats experts,
      std::optional<MlpFormats> shared,
      Routing routing,
      float eps)
      : MetalBlock(stream, std::move(chain)),
        experts_(experts),
        shared_(shared),
        routing_(routing),
        eps_(eps) {}
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

 private:
  MlpFormats experts_;
  std::optional<MlpFormats> shared_;
  Routing routing_;
  float eps_;
};

// The same where `experts` are slots that are filled on request. Evaluation
// begins what the GPU has to do up to the router's choice, has it compute what
// can be had of the shared experts meanwhile, and returns once the slots are
// filled and what reads them is encoded: nothing that the GPU is given waits
// for a disk. It crosses to the GPU and back once.
class MetalStreamedMoe : public mx::Primitive {
 public:
  MetalStreamedMoe(
      mx::Stream stream,
      MlpFormats experts,
      std::optional<MlpFormats> shared,
      Routing routing,
      float eps,
      std::shared_ptr<Arrivals> arrivals)
      : mx::Primitive(stream),
        experts_(experts),
        shared_(shared),
        routing_(routing),
        eps_(eps),
        arrivals_(std::move(arrivals)) {}
  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&)
      override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "StreamedMoe";
  }

 private:
  MlpFormats experts_;
  std::optional<MlpFormats> shared_;
  Routing routing_;
  float eps_;
  std::shared_ptr<Arrivals> arrivals_;
};

// These take and return what the functions of ops.h without `metal` do.
std::vector<mx::array> metal_attention_project(
    const mx::array& x,
    const AttentionProjections& projections,
    const mx::array& cosines,
    const mx::array& sines,
    bool score,
    mx::StreamOrDevice s);
mx::array metal_attention_output(
    const mx::array& x,
    const mx::array& attended,
    const Weight& unembed_out,
    const Weight& o_proj,
    mx::StreamOrDevice s);
// Returns x + o_proj(unembed_out(sparse_mla_decode(q, ...))).
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
    mx::StreamOrDevice s);
mx::array metal_mlp_block(
    const mx::array& x,
    const Norm& norm,
    const Mlp& weights,
    mx::StreamOrDevice s);

mx::array metal_moe_block(
    const mx::array& x,
    const Norm& norm,
    const Router& router,
    const Mlp& experts,
    const std::optional<Mlp>& shared,
    mx::StreamOrDevice s);

// Returns the same, where `experts` are slots that `arrivals` fills. It is
// evaluated after `last`, if there is one.
mx::array metal_streamed_moe(
    const mx::array& x,
    const Norm& norm,
    const Router& router,
    const Mlp& experts,
    const std::optional<Mlp>& shared,
    const std::shared_ptr<Arrivals>& arrivals,
    const std::optional<mx::array>& last,
    mx::StreamOrDevice s);

}  // namespace glm_fused
