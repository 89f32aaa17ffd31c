// Vector-Jacobian products of what writes and reads caches, as in
// gradients.cpp.
#include <limits>

#include "cache_primitives.h"
#include "checks.h"
#include "ops/differentiate.h"

namespace glm_fused {

namespace {

Arrays zeros_for(const Arrays& primals, const std::vector<int>& argnums) {
  Arrays result;
  for (int i : argnums) {
    result.push_back(mx::zeros_like(primals[i]));
  }
  return result;
}

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
