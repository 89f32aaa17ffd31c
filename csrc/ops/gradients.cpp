// Vector-Jacobian products: each op again, in MLX's own ops and in float32.
#include <algorithm>
#include <functional>
#include <limits>

#include "cache_primitives.h"
#include "checks.h"

namespace glm_fused {

namespace {

using Arrays = std::vector<mx::array>;
using Chain = std::function<mx::array(const Arrays&)>;

// The gradients of `chain`, which computes `cotangent`'s output from `primals`.
// Integers, such as the experts that were chosen, have none: zeros.
Arrays differentiate(
    const Chain& chain,
    const Arrays& primals,
    const mx::array& cotangent,
    const std::vector<int>& argnums) {
  std::vector<int> floats;
  Arrays chosen;
  for (int i : argnums) {
    if (mx::issubdtype(primals[i].dtype(), mx::floating)) {
      floats.push_back(i);
      chosen.push_back(primals[i]);
    }
  }
  auto given = [&](const Arrays& values) {
    Arrays all = primals;
    for (size_t j = 0; j < floats.size(); j++) {
      all[floats[j]] = values[j];
    }
    return Arrays{chain(all)};
  };
  Arrays grads;
  if (!chosen.empty()) {
    grads = mx::vjp(given, chosen, {cotangent}).second;
  }
  Arrays result;
  for (int i : argnums) {
    const auto found = std::find(floats.begin(), floats.end(), i);
    result.push_back(
        found == floats.end() ? mx::zeros_like(primals[i])
                              : grads[found - floats.begin()]);
  }
  return result;
}

Arrays zeros_for(const Arrays& primals, const std::vector<int>& argnums) {
  Arrays result;
  for (int i : argnums) {
    result.push_back(mx::zeros_like(primals[i]));
  }
  return result;
}

mx::array as_float32(const mx::array& a, const mx::Stream& s) {
  return mx::astype(a, mx::float32, s);
}

// The values of a weight in a format that MLX has no ops for, in float32.
mx::array
decoded(const mx::array* planes, const FormatSpec& spec, const mx::Stream& s) {
  if (is_gguf(spec.family)) {
    return gguf_values({{planes[0]}, &spec});
  }
  const PlaneSpec& scale = spec.planes[1];
  const mx::array codes = mx::from_fp8(planes[0], mx::float32, s);
  mx::array scales = mx::repeat(as_float32(planes[1], s), spec.block, -1, s);
  scales = mx::repeat(scales, scale.rows, -2, s);
  const mx::Shape begin(codes.ndim(), 0);
  return mx::multiply(codes, mx::slice(scales, begin, codes.shape(), s), s);
}

// x W^T; `next` is the position of the weight's first plane, then moves on.
// With `slots`, W is a stack and each of x [rows, 1, k] takes its own matrix of
// it; they are ascending, for which MLX sums a matrix's gradient as it goes.
mx::array project(
    const mx::array& x,
    const Arrays& inputs,
    size_t& next,
    const Format& format,
    const std::optional<mx::array>& slots,
    const mx::Stream& s) {
  const FormatSpec& spec = *format.spec;
  const mx::array* const planes = &inputs[next];
  next += spec.plane_count;
  if (spec.mode == "dense" || spec.mode.empty()) {
    const mx::array rows =
        spec.mode.empty() ? decoded(planes, spec, s) : as_float32(planes[0], s);
    const mx::array columns = mx::swapaxes(rows, -1, -2, s);
    return slots ? mx::gather_mm(x, columns, std::nullopt, slots, true, s)
                 : mx::matmul(x, columns, s);
  }
  const bool factors = spec.planes[2].per_matrix;
  const auto biases = spec.plane_count == 3 && !factors
      ? std::optional(planes[2])
      : std::nullopt;
  const std::string mode(spec.mode);
  const mx::array y = slots ? mx::gather_qmm(
                                  x,
                                  planes[0],
                                  planes[1],
                                  biases,
                                  std::nullopt,
                                  slots,
                                  true,
                                  spec.block,
                                  spec.bits,
                                  mode,
                                  std::nullopt,
                                  true,
                                  s)
                            : mx::quantized_matmul(
                                  x,
                                  planes[0],
                                  planes[1],
                                  biases,
                                  true,
                                  spec.block,
                                  spec.bits,
                                  mode,
                                  s);
  if (!factors) {
    return y;
  }
  const mx::array factor =
      slots ? mx::take(planes[2], *slots, 0, s) : planes[2];
  return mx::multiply(y, mx::expand_dims(factor, {-2, -1}, s), s);
}

mx::array
swiglu_chain(const mx::array& gate, const mx::array& up, const mx::Stream& s) {
  const mx::array g = as_float32(gate, s);
  const mx::array silu = mx::multiply(g, mx::sigmoid(g, s), s);
  return mx::multiply(silu, as_float32(up, s), s);
}

mx::array expert_sum_chain(
    const mx::array& y,
    const mx::array& scores,
    const mx::Stream& s) {
  const mx::array weighted =
      mx::multiply(as_float32(y, s), mx::expand_dims(scores, -1, s), s);
  return mx::sum(weighted, 1, false, s);
}

// The chains below are those of ops/stock.py in float32.
mx::array
inverse_root(const mx::array& centered, float eps, const mx::Stream& s) {
  const mx::array mean = mx::mean(mx::square(centered, s), -1, true, s);
  return mx::rsqrt(mx::add(mean, mx::array(eps), s), s);
}

mx::array
rotate_chain(const Arrays& in, bool interleaved, const mx::Stream& s) {
  const mx::array x = as_float32(in[0], s);
  const int pairs = in[1].shape(-1);
  const auto halves = mx::split(x, mx::Shape{2 * pairs}, -1, s);
  const mx::array &head = halves[0], &tail = halves[1];
  // [..., pairs, 2] or [..., 2, pairs]
  const int axis = interleaved ? -1 : -2;
  mx::Shape shape = x.shape();
  shape.back() = interleaved ? pairs : 2;
  shape.push_back(interleaved ? 2 : pairs);
  const auto parts = mx::split(mx::reshape(head, shape, s), 2, axis, s);
  const mx::array a = mx::squeeze(parts[0], axis, s);
  const mx::array b = mx::squeeze(parts[1], axis, s);
  const mx::array first =
      mx::subtract(mx::multiply(a, in[1], s), mx::multiply(b, in[2], s), s);
  const mx::array second =
      mx::add(mx::multiply(b, in[1], s), mx::multiply(a, in[2], s), s);
  const mx::array rotated =
      mx::reshape(mx::stack({first, second}, axis, s), head.shape(), s);
  return mx::concatenate({rotated, tail}, -1, s);
}

// A norm's cotangent in float32 and in the shape of x as the node has it.
mx::array
rows_like(const mx::array& cotangent, const mx::array& x, const mx::Stream& s) {
  return as_float32(mx::reshape(cotangent, x.shape(), s), s);
}

}  // namespace

Arrays QuantizedMatvec::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& inputs) {
    size_t next = 1;
    const mx::array x = as_float32(inputs[0], s);
    return project(x, inputs, next, format_, std::nullopt, s);
  };
  return differentiate(chain, primals, as_float32(cotangents[0], s), argnums);
}

Arrays MoeDecode::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  if (arrivals_) {
    invalid("moe_decode", "streamed experts have no gradient.");
  }
  const mx::Stream s = stream();
  const int top_k = primals[1].shape(1);
  const mx::array flat = mx::flatten(primals[1], s);
  const mx::array order = mx::argsort(flat, s);
  const mx::array back = mx::argsort(order, s);
  const mx::array slots = mx::take(flat, order, s);
  const mx::array token =
      mx::floor_divide(order, mx::array(top_k, mx::uint32), s);
  auto chain = [&](const Arrays& inputs) {
    size_t next = 3;
    const mx::array rows =
        mx::expand_dims(mx::take(as_float32(inputs[0], s), token, 0, s), 1, s);
    const mx::array gate = project(rows, inputs, next, gate_, slots, s);
    const mx::array up = project(rows, inputs, next, up_, slots, s);
    const mx::array act = swiglu_chain(gate, up, s);
    mx::array y = project(act, inputs, next, down_, slots, s);
    y = mx::take(mx::squeeze(y, 1, s), back, 0, s);
    y = mx::unflatten(y, 0, {-1, top_k}, s);
    return expert_sum_chain(y, inputs[2], s);
  };
  return differentiate(chain, primals, as_float32(cotangents[0], s), argnums);
}

// Which experts are chosen has no gradient; how much each weighs has.
Arrays RouterTopk::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays& outputs) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& inputs) {
    const mx::array w = mx::swapaxes(as_float32(inputs[1], s), 0, 1, s);
    const mx::array logits = mx::matmul(as_float32(inputs[0], s), w, s);
    const mx::array all = mx::sigmoid(logits, s);
    mx::array scores = mx::take_along_axis(all, outputs[0], 1, s);
    if (routing_.norm_topk_prob) {
      const mx::array tiny(1e-20f);
      const mx::array total = mx::add(mx::sum(scores, 1, true, s), tiny, s);
      scores = mx::divide(scores, total, s);
    }
    return mx::multiply(scores, mx::array(routing_.routed_scaling_factor), s);
  };
  return differentiate(chain, primals, cotangents[1], argnums);
}

Arrays Swiglu::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) { return swiglu_chain(in[0], in[1], s); };
  return differentiate(chain, primals, as_float32(cotangents[0], s), argnums);
}

Arrays ResidualAdd::vjp(
    const Arrays&,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  return Arrays(argnums.size(), cotangents[0]);
}

Arrays ExpertSum::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) {
    return expert_sum_chain(in[0], in[1], s);
  };
  return differentiate(chain, primals, as_float32(cotangents[0], s), argnums);
}

Arrays RmsNorm::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) {
    const mx::array x = as_float32(in[0], s);
    const mx::array y = mx::multiply(x, inverse_root(x, eps_, s), s);
    return mx::multiply(y, as_float32(in[1], s), s);
  };
  return differentiate(
      chain, primals, rows_like(cotangents[0], primals[0], s), argnums);
}

Arrays LayerNorm::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) {
    const mx::array x = as_float32(in[0], s);
    const mx::array c = mx::subtract(x, mx::mean(x, -1, true, s), s);
    mx::array y = mx::multiply(c, inverse_root(c, eps_, s), s);
    y = mx::multiply(y, as_float32(in[1], s), s);
    return mx::add(y, as_float32(in[2], s), s);
  };
  return differentiate(
      chain, primals, rows_like(cotangents[0], primals[0], s), argnums);
}

Arrays Rotate::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) {
    return rotate_chain(in, interleaved_, s);
  };
  return differentiate(chain, primals, as_float32(cotangents[0], s), argnums);
}

Arrays AppendRows::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) {
    mx::Shape end = in[1].shape();
    end[2] += at_;
    return mx::slice_update(in[0], in[1], {0, 0, at_, 0}, end, s);
  };
  Arrays grads;
  for (int i : argnums) {
    const Arrays of_one = {primals[i / 2 * 2], primals[i / 2 * 2 + 1]};
    grads.push_back(
        differentiate(chain, of_one, cotangents[i / 2], {i % 2})[0]);
  }
  return grads;
}

Arrays AppendPacked::vjp(
    const Arrays&,
    const Arrays&,
    const std::vector<int>&,
    const Arrays&) {
  invalid(
      "append_packed",
      "packed rows have no gradient; leave kv_format at auto.");
}

Arrays FirstRows::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  const mx::Stream s = stream();
  auto chain = [&](const Arrays& in) {
    mx::Shape end = in[0].shape();
    end[2] = cotangents[0].shape(1);
    return mx::squeeze(mx::slice(in[0], {0, 0, 0, 0}, end, s), 1, s);
  };
  return differentiate(chain, primals, cotangents[0], argnums);
}

Arrays IndexerTopk::vjp(
    const Arrays& primals,
    const Arrays&,
    const std::vector<int>& argnums,
    const Arrays&) {
  return zeros_for(primals, argnums);
}

namespace {

// Whether each query sees each of `total` keys: [b, l, total].
mx::array visible_keys(
    const Arrays& inputs,
    bool selected,
    int length,
    int total,
    const mx::Stream& s) {
  const mx::array keys = mx::arange(total, s);
  const mx::array queries =
      mx::expand_dims(mx::arange(total - length, total, s), 1, s);
  const mx::array start = mx::expand_dims(inputs[1], {1, 2}, s);
  const mx::array seen = mx::logical_and(
      mx::less_equal(keys, queries, s), mx::greater_equal(keys, start, s), s);
  if (!selected) {
    return seen;
  }
  // An extra column takes what selects no key.
  const mx::array& list = inputs.back();
  const mx::array column(total);
  const mx::array valid = mx::logical_and(
      mx::greater_equal(list, mx::array(0), s), mx::less(list, column, s), s);
  const mx::array columns = mx::where(valid, list, column, s);
  const mx::array chosen = mx::put_along_axis(
      mx::zeros({list.shape(0), length, total + 1}, mx::bool_, s),
      columns,
      mx::full(list.shape(), true, mx::bool_, s),
      -1,
      s);
  const mx::Shape stop = {list.shape(0), length, total};
  return mx::logical_and(seen, mx::slice(chosen, {0, 0, 0}, stop, s), s);
}

}  // namespace

Arrays SparseMlaDecode::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  if (layout_.format != RowFormat::floating) {
    invalid(
        "sparse_mla_decode",
        "packed rows have no gradient; leave kv_format at auto.");
  }
  const mx::Stream s = stream();
  const mx::Shape& shape = primals[0].shape();
  const int batch = shape[0], length = shape[1], heads = shape[2];
  const int total = primals[2].shape(1);
  const mx::array visible =
      mx::expand_dims(visible_keys(primals, selected_, length, total, s), 2, s);
  auto chain = [&](const Arrays& inputs) {
    const mx::array latents = as_float32(inputs[2], s);
    const mx::array rows = ropes_
        ? mx::concatenate({latents, as_float32(inputs[3], s)}, -1, s)
        : latents;
    mx::array q = as_float32(inputs[0], s);
    q = mx::reshape(q, {batch, length * heads, shape[3]}, s);
    mx::array scores = mx::matmul(q, mx::swapaxes(rows, 1, 2, s), s);
    scores = mx::reshape(scores, {batch, length, heads, total}, s);
    scores = mx::multiply(scores, mx::array(scale_), s);
    // Not -inf: a query without keys would have a gradient of NaN.
    const mx::array lowest(std::numeric_limits<float>::lowest());
    const mx::array weights =
        mx::softmax(mx::where(visible, scores, lowest, s), -1, false, s);
    const mx::array out = mx::matmul(
        mx::reshape(
            mx::where(visible, weights, mx::array(0.0f), s),
            {batch, length * heads, total},
            s),
        latents,
        s);
    return mx::reshape(out, {batch, length, heads, layout_.rank}, s);
  };
  return differentiate(chain, primals, cotangents[0], argnums);
}

}  // namespace glm_fused
