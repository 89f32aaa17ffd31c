// The graph nodes behind the ops.
#pragma once

#include <vector>

#include "mlx/primitives.h"
#include "ops.h"

namespace glm_fused {

class FusedPrimitive : public mx::Primitive {
 public:
  FusedPrimitive(mx::Stream stream, bool reference)
      : mx::Primitive(stream), reference_(reference) {}

  // Throws: for primitives and builds without a Metal kernel.
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
  const char* name() const override {
    return "QuantizedMatvec";
  }

 private:
  Format format_;
};

// inputs: x [t, hidden], slots [t, top_k], scores [t, top_k], then the arrays
// of gate, up and down. output: [t, hidden].
class MoeDecode : public FusedPrimitive {
 public:
  MoeDecode(
      mx::Stream stream,
      bool reference,
      Format gate,
      Format up,
      Format down)
      : FusedPrimitive(stream, reference), gate_(gate), up_(up), down_(down) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "MoeDecode";
  }

 private:
  Format gate_, up_, down_;
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
  const char* name() const override {
    return "Swiglu";
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
  const char* name() const override {
    return "ExpertSum";
  }
};

}  // namespace glm_fused
