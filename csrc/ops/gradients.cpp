// Vector-Jacobian products: each op again, in MLX's own ops and in float32.
#include "checks.h"
#include "ops/differentiate.h"
#include "primitives.h"

namespace glm_fused {

namespace {

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

}  // namespace glm_fused
