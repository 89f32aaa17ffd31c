#include "ops/known_ids.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include "mlx/dtype_utils.h"
#include "mlx/primitives.h"

namespace glm_fused {

namespace mx = mlx::core;

namespace {

// These primitives give the values of their first input, in order.
constexpr std::string_view kSameValues[] = {
    "Contiguous",
    "Copy",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Squeeze",
    "StopGradient",
    "Unflatten"};
// And these give some of them.
constexpr std::string_view kSomeValues[] = {"Slice", "Transpose"};

template <size_t n>
bool is_one_of(const std::string_view (&names)[n], std::string_view name) {
  return std::ranges::find(names, name) != std::end(names);
}

template <class T>
bool all_below(const mx::array& ids, int64_t bound) {
  const T* values = ids.data<T>();
  return std::all_of(values, values + ids.size(), [&](T id) {
    return std::cmp_greater_equal(id, 0) && std::cmp_less(id, bound);
  });
}

bool values_below(const mx::array& ids, int64_t bound) {
  switch (ids.dtype()) {
    case mx::int32:
      return all_below<int32_t>(ids, bound);
    case mx::int64:
      return all_below<int64_t>(ids, bound);
    case mx::uint32:
      return all_below<uint32_t>(ids, bound);
    case mx::uint64:
      return all_below<uint64_t>(ids, bound);
    default:
      return false;
  }
}

bool is_wide_integer(mx::Dtype type) {
  return mx::issubdtype(type, mx::integer) && type.size() >= 4;
}

}  // namespace

bool is_readable(const mx::array& a) {
  return !a.is_tracer() && a.is_available() && a.flags().row_contiguous;
}

bool known_below(const mx::array& ids, int64_t bound) {
  mx::array at = ids;
  while (is_wide_integer(at.dtype())) {
    if (is_readable(at)) {
      return values_below(at, bound);
    }
    if (!at.has_primitive() || at.inputs().empty()) {
      return false;
    }
    const std::string_view name = at.primitive().name();
    const mx::array& from = at.inputs()[0];
    if (name == "ArgReduce") {
      // A compiled graph may run again with other shapes.
      return !at.is_tracer() && at.size() > 0 &&
          static_cast<int64_t>(from.size() / at.size()) <= bound;
    }
    if (name == "RouterTopk") {
      return at.sibling_position() == 0 && at.inputs()[1].shape(0) <= bound;
    }
    if (name != "AsType" && !is_one_of(kSameValues, name) &&
        !is_one_of(kSomeValues, name)) {
      return false;
    }
    at = mx::array(from);
  }
  return false;
}

std::optional<mx::array> being_computed(const mx::array& ids) {
  mx::array at = ids;
  while (at.has_primitive()) {
    if (at.is_tracer() || !is_one_of(kSameValues, at.primitive().name())) {
      return std::nullopt;
    }
    at = mx::array(at.inputs()[0]);
  }
  const bool is = at.status() == mx::array::Status::evaluated &&
      at.event().valid() && at.flags().row_contiguous && !at.is_tracer();
  return is ? std::optional(at) : std::nullopt;
}

}  // namespace glm_fused
