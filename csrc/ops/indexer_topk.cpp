#include "cache_primitives.h"
#include "ops/check_rows.h"
#include "ops/placement.h"

namespace glm_fused {

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
    mx::StreamOrDevice s) {
  const std::string op = "indexer_topk";
  check_float(op, "q", q);
  if (q.ndim() != 4 || q.shape(2) < 1 || q.shape(3) < 1) {
    invalid(
        op,
        "q must be [batch, queries, heads, dim] but has shape ",
        shape_of(q),
        ".");
  }
  const int batch = q.shape(0), queries = q.shape(1);
  check_count(op, "the values of a query", {q.shape(2), q.shape(3)});
  const RowLayout layout = check_rows(op, "keys", keys, batch, q.shape(3), 0);
  check_keys(op, keys.shape(1), queries);
  check_float(op, "weights", weights);
  check_shape(op, "weights", weights, {batch, queries, q.shape(2)});
  if (k < 1) {
    invalid(op, "k must be at least 1 but is ", k, ".");
  }
  check_count(op, "the selected keys", {batch, queries, k});
  mx::array weighed = mx::astype(weights, mx::float32, s);
  if (!is_metal(s)) {
    if (weight_scale != 1) {
      weighed = mx::multiply(weighed, mx::array(weight_scale), s);
    }
    weight_scale = 1;
  }
  auto primitive = place(
      std::make_shared<IndexerTopk>(
          mx::to_stream(s), reference, prompt, layout, scale, weight_scale));
  return mx::array(
      {batch, queries, k},
      mx::int32,
      primitive,
      {mx::contiguous(q, false, s),
       keys,
       mx::contiguous(weighed, false, s),
       first_keys(op, start, batch, s)});
}

}  // namespace glm_fused
