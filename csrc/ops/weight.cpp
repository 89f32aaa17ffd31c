#include <algorithm>

#include "checks.h"

namespace glm_fused {

namespace {

struct ModeRule {
  const char* name;
  Mode mode;
  std::vector<int> bits;
  std::vector<int> group_sizes;
};

const std::vector<ModeRule>& rules() {
  // Never destroyed: threads may build graphs while the process ends.
  static const auto& table = *new std::vector<ModeRule>{
      {"affine", Mode::affine, {2, 3, 4, 5, 6, 8}, {32, 64, 128}},
      {"mxfp4", Mode::mxfp4, {4}, {32}},
      {"mxfp8", Mode::mxfp8, {8}, {32}},
      {"nvfp4", Mode::nvfp4, {4}, {16}},
  };
  return table;
}

std::string choices(const std::vector<int>& values) {
  std::string text;
  for (int v : values) {
    text += (text.empty() ? "" : ", ") + std::to_string(v);
  }
  return text;
}

void check_choice(
    const std::string& op,
    const std::string& what,
    const ModeRule& rule,
    const std::vector<int>& values,
    int found) {
  if (std::find(values.begin(), values.end(), found) == values.end()) {
    invalid(
        op,
        what,
        " must be one of ",
        choices(values),
        " in mode ",
        rule.name,
        " but is ",
        found,
        ".");
  }
}

void check_scales(
    const std::string& op,
    const std::string& name,
    const Weight& w,
    const mx::Shape& shape,
    bool affine) {
  check_shape(op, name + ".scales", *w.scales, shape);
  if (!affine) {
    if (w.scales->dtype() != mx::uint8) {
      invalid(
          op,
          name,
          ".scales must be uint8 in mode ",
          w.mode,
          " but is ",
          w.scales->dtype(),
          ".");
    }
    if (w.biases) {
      invalid(op, name, ".biases must be absent in mode ", w.mode, ".");
    }
    return;
  }
  check_float(op, name + ".scales", *w.scales);
  if (!w.biases) {
    invalid(op, name, ".biases is required in mode affine.");
  }
  check_shape(op, name + ".biases", *w.biases, shape);
  if (w.biases->dtype() != w.scales->dtype()) {
    invalid(
        op,
        name,
        ".biases must have the dtype of scales, ",
        w.scales->dtype(),
        ", but is ",
        w.biases->dtype(),
        ".");
  }
}

}  // namespace

FloatType float_type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? FloatType::float32
      : dtype == mx::float16  ? FloatType::float16
                              : FloatType::bfloat16;
}

Format check_weight(
    const std::string& op,
    const std::string& name,
    const Weight& w,
    int ndim,
    int k) {
  if (static_cast<int>(w.weight.ndim()) != ndim) {
    invalid(
        op,
        name,
        ".weight must have ",
        ndim,
        " dimensions but has shape ",
        shape_of(w.weight),
        ".");
  }
  if (k < 1) {
    invalid(op, name, " must have at least one column but has ", k, ".");
  }
  auto shape = w.weight.shape();
  if (w.mode == "dense") {
    check_float(op, name + ".weight", w.weight);
    if (w.scales || w.biases) {
      invalid(op, name, ": a dense weight takes no scales or biases.");
    }
    shape.back() = k;
    check_shape(op, name + ".weight", w.weight, shape);
    return {Mode::dense, 0, 0, float_type_of(w.weight.dtype())};
  }
  const auto rule =
      std::find_if(rules().begin(), rules().end(), [&](const ModeRule& r) {
        return w.mode == r.name;
      });
  if (rule == rules().end()) {
    invalid(
        op,
        name,
        ".mode must be dense, affine, mxfp4, mxfp8 or nvfp4 but is ",
        w.mode,
        ".");
  }
  check_choice(op, name + ".bits", *rule, rule->bits, w.bits);
  check_choice(
      op, name + ".group_size", *rule, rule->group_sizes, w.group_size);
  if (w.weight.dtype() != mx::uint32) {
    invalid(
        op,
        name,
        ".weight must be uint32 in mode ",
        w.mode,
        " but is ",
        w.weight.dtype(),
        ".");
  }
  if (!w.scales) {
    invalid(op, name, ".scales is required in mode ", w.mode, ".");
  }
  if (k % w.group_size != 0 || static_cast<int64_t>(k) * w.bits % 32 != 0) {
    invalid(
        op,
        name,
        ": ",
        k,
        " columns are no whole number of groups of ",
        w.group_size,
        ".");
  }
  shape.back() = k / 32 * w.bits + k % 32 * w.bits / 32;
  check_shape(op, name + ".weight", w.weight, shape);
  shape.back() = k / w.group_size;
  const bool affine = rule->mode == Mode::affine;
  check_scales(op, name, w, shape, affine);
  return {
      rule->mode,
      w.bits,
      w.group_size,
      affine ? float_type_of(w.scales->dtype()) : FloatType::float32};
}

namespace {

// Evaluated weights are bound as they lie: mx::contiguous would copy a view
// of a larger buffer.
mx::array in_rows(const mx::array& a, mx::StreamOrDevice s) {
  return a.is_available() && a.flags().row_contiguous
      ? a
      : mx::contiguous(a, false, s);
}

}  // namespace

void append_arrays(
    std::vector<mx::array>& inputs,
    const Weight& w,
    mx::StreamOrDevice s) {
  inputs.push_back(in_rows(w.weight, s));
  if (w.scales) {
    inputs.push_back(in_rows(*w.scales, s));
  }
  if (w.biases) {
    inputs.push_back(in_rows(*w.biases, s));
  }
}

}  // namespace glm_fused
