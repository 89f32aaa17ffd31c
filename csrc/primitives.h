// The graph nodes behind the ops; those that write and read caches are in
// cache_primitives.h. Their gradients (ops/gradients.cpp) are those of the same
// computation in MLX's own ops.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "ops.h"

namespace glm_fused {

class FusedPrimitive : public mx::Primitive {
 public:
  FusedPrimitive(mx::Stream stream, bool reference)
      : mx::Primitive(stream), reference_(reference) {}

  // Throws; it serves primitives and builds without a Metal kernel.
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&)
      override;

 protected:
  bool reference_;
};

// inputs: x [..., h, m, k], the weight's arrays. output: [..., h, m, n].
class QuantizedMatvec : public FusedPrimitive {
 public:
  QuantizedMatvec(mx::Stream stream, bool reference, Format format)
      : FusedPrimitive(stream, reference), format_(format) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "QuantizedMatvec";
  }

 private:
  Format format_;
};

// inputs: x [t, k] or [t, top_k, k], slots [t, top_k], the weight's arrays.
// output: [t, top_k, n]. It has no gradient.
class ExpertMatvec : public FusedPrimitive {
 public:
  static constexpr const char* name_of_op = "expert_matvec";
  ExpertMatvec(
      mx::Stream stream,
      bool reference,
      Format format,
      bool known_slots)
      : FusedPrimitive(stream, reference),
        format_(format),
        known_slots_(known_slots) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "ExpertMatvec";
  }

 private:
  Format format_;
  bool known_slots_;  // whether all slots are known to exist; else it checks
};

// inputs: x [t, hidden], slots [t, top_k], scores [t, top_k], then the arrays
// of gate, up and down. output: [t, hidden].
class MoeDecode : public FusedPrimitive {
 public:
  MoeDecode(
      mx::Stream stream,
      bool reference,
      bool prompt,
      Format gate,
      Format up,
      Format down,
      std::shared_ptr<Arrivals> arrivals,
      bool known_slots)
      : FusedPrimitive(stream, reference),
        prompt_(prompt),
        gate_(gate),
        up_(up),
        down_(down),
        arrivals_(std::move(arrivals)),
        known_slots_(known_slots) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "MoeDecode";
  }

 private:
  bool prompt_;  // whether Metal groups the tokens by slot
  Format gate_, up_, down_;
  std::shared_ptr<Arrivals> arrivals_;  // null: all slots are filled
  bool known_slots_;  // whether all slots are known to exist; else it checks
};

// inputs: x [t, hidden], weight [e, hidden], correction_bias [e].
// outputs: experts, scores [t, top_k].
class RouterTopk : public FusedPrimitive {
 public:
  RouterTopk(mx::Stream stream, bool reference, Routing routing)
      : FusedPrimitive(stream, reference), routing_(routing) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "RouterTopk";
  }

 private:
  Routing routing_;
};

// inputs: gate, up of one shape and dtype. output: the same.
class Swiglu : public FusedPrimitive {
 public:
  explicit Swiglu(mx::Stream stream) : FusedPrimitive(stream, true) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "Swiglu";
  }
};

// inputs: tokens, then the arrays of the table. output: [.., hidden].
class Embed : public FusedPrimitive {
 public:
  Embed(mx::Stream stream, Format format)
      : FusedPrimitive(stream, false), format_(format) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "Embed";
  }

 private:
  Format format_;
};

// inputs: x, y of one shape and dtype. output: the same.
class ResidualAdd : public FusedPrimitive {
 public:
  explicit ResidualAdd(mx::Stream stream) : FusedPrimitive(stream, true) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "ResidualAdd";
  }
};

// inputs: y [t, top_k, hidden], scores [t, top_k]. output: [t, hidden].
class ExpertSum : public FusedPrimitive {
 public:
  explicit ExpertSum(mx::Stream stream) : FusedPrimitive(stream, true) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "ExpertSum";
  }
};

// inputs: x of at most four axes, weight [n]. output: x's values in rows.
class RmsNorm : public FusedPrimitive {
 public:
  RmsNorm(mx::Stream stream, bool reference, float eps)
      : FusedPrimitive(stream, reference), eps_(eps) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "RmsNorm";
  }

 private:
  float eps_;
};

// inputs: x of at most four axes, weight, bias [n]. output: x's values in rows.
class LayerNorm : public FusedPrimitive {
 public:
  LayerNorm(mx::Stream stream, bool reference, float eps)
      : FusedPrimitive(stream, reference), eps_(eps) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "LayerNorm";
  }

 private:
  float eps_;
};

// inputs: x [b, h, l, d], cosines, sines [b or 1, 1, l, pairs]. output: as x.
class Rotate : public FusedPrimitive {
 public:
  Rotate(mx::Stream stream, bool reference, bool interleaved)
      : FusedPrimitive(stream, reference), interleaved_(interleaved) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "Rotate";
  }

 private:
  bool interleaved_;
};

}  // namespace glm_fused
