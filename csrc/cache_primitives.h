// The graph nodes that write and read the rows of caches.
#pragma once

#include "primitives.h"
#include "row_layout.h"

namespace glm_fused {

// No inputs. output: zeros [b, 1, capacity, width].
class CacheBuffer : public FusedPrimitive {
 public:
  explicit CacheBuffer(mx::Stream stream) : FusedPrimitive(stream, false) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "CacheBuffer";
  }
};

// Writes rows to caches, from row `at` on. Output i is what becomes of input
// 2 i, a cache's buffer, and after each buffer comes what is written to it.
class Append : public FusedPrimitive {
 public:
  Append(mx::Stream stream, int at) : FusedPrimitive(stream, false), at_(at) {}
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  // Writes what comes after the buffers among the inputs to `targets`, the
  // rows of each buffer that are its place.
  virtual void write(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& targets) = 0;

 protected:
  const int at_;
};

// inputs: of each of one or two caches its buffer [b, 1, capacity, width] and
// rows [b, 1, l, width]. outputs: as the buffers.
class AppendRows : public Append {
 public:
  using Append::Append;
  void write(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& targets) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "AppendRows";
  }
};

// inputs: buffer [b, 1, capacity, bytes], values [b, 1, l, rank], then, if the
// layout has any, RoPE values [b, 1, l, rope] of the same type. output: as the
// buffer.
class AppendPacked : public Append {
 public:
  AppendPacked(mx::Stream stream, int at, RowLayout layout)
      : Append(stream, at), layout_(layout) {}
  void write(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& targets) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "AppendPacked";
  }

 private:
  const RowLayout layout_;
};

// inputs: [b, 1, capacity, width]. output: a view of it, [b, t, width].
class FirstRows : public FusedPrimitive {
 public:
  explicit FirstRows(mx::Stream stream) : FusedPrimitive(stream, true) {}
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
    return "FirstRows";
  }
};

// Reads the rows of caches.
class ReadRows : public FusedPrimitive {
 public:
  using FusedPrimitive::FusedPrimitive;
  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    read(inputs, outputs, nullptr);
  }
  // Does the same where a cache has `*filled` rows whenever the kernel runs, of
  // as many as the inputs have.
  virtual void read(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const int* filled) = 0;
};

// inputs: q [b, l, heads, dim], keys [b, t, row], weights [b, l, heads], start
// [b]. output: [b, l, k].
class IndexerTopk : public ReadRows {
 public:
  IndexerTopk(
      mx::Stream stream,
      bool reference,
      bool prompt,
      RowLayout layout,
      float scale,
      float weight_scale)
      : ReadRows(stream, reference),
        prompt_(prompt),
        layout_(layout),
        scale_(scale),
        weight_scale_(weight_scale) {}
  void read(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const int* filled) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "IndexerTopk";
  }

 private:
  bool prompt_;  // whether Metal takes a prompt's kernel
  RowLayout layout_;
  float scale_;
  float weight_scale_;  // 1 but on Metal
};

// inputs: q [b, l, heads, rank + rope], start [b], latents [b, t, row], then
// the RoPE keys [b, t, rope] if `ropes` and the selection [b, l, k] if
// `selected`. output: [b, l, heads, rank].
class SparseMlaDecode : public ReadRows {
 public:
  SparseMlaDecode(
      mx::Stream stream,
      bool reference,
      bool prompt,
      RowLayout layout,
      float scale,
      bool ropes,
      bool selected)
      : ReadRows(stream, reference),
        prompt_(prompt),
        layout_(layout),
        scale_(scale),
        ropes_(ropes),
        selected_(selected) {}
  void read(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const int* filled) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "SparseMlaDecode";
  }

 private:
  bool prompt_;  // whether Metal takes a prompt's kernel
  RowLayout layout_;
  float scale_;
  bool ropes_, selected_;
};

}  // namespace glm_fused
