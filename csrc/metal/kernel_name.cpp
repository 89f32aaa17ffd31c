#include "metal/kernel_name.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>

#include "formats/families.h"
#include "formats/weight.h"

namespace glm_fused::metal {

namespace {

std::string type_name(int type) {
  const auto is = [type](FloatType t) { return type == static_cast<int>(t); };
  return is(FloatType::float32) ? "float"
      : is(FloatType::float16)  ? "float16_t"
                                : "bfloat16_t";
}

int type_number(mx::Dtype dtype) {
  return static_cast<int>(float_type_of(dtype));
}

std::string rows_name(int format, int latents, int ropes) {
  switch (static_cast<RowFormat>(format)) {
    case RowFormat::fp8:
      return "Fp8Rows";
    case RowFormat::int8:
      return "Int8Rows";
    default:
      return "FloatRows<" + type_name(latents) + ", " + type_name(ropes) + ">";
  }
}

}  // namespace

Argument::Argument(mx::Dtype type)
    : Argument(Kind::type, 0, 0, type_number(type)) {}

Argument Argument::word(int bytes) {
  return {Kind::word, 0, 0, bytes};
}

Argument Argument::row(const Format& format, int n, int k) {
  const auto place = format.spec - formats().data();
  return {
      Kind::row,
      static_cast<int>(format.float_type),
      uses_fast_order(format, n, k),
      static_cast<int>(place)};
}

Argument Argument::row_of_fours(mx::Dtype type) {
  return {Kind::row_of_fours, 0, 0, type_number(type)};
}

Argument Argument::packing(RowFormat format) {
  return {Kind::packing, 0, 0, static_cast<int>(format)};
}

Argument Argument::cached_rows(
    const RowLayout& layout,
    const mx::array& latents,
    const mx::array* ropes) {
  const int format = static_cast<int>(layout.format);
  if (layout.format != RowFormat::floating) {
    return {Kind::cached_rows, format, 0, 0};
  }
  return {
      Kind::cached_rows,
      format,
      type_number(latents.dtype()),
      type_number((ropes ? *ropes : latents).dtype())};
}

std::string Argument::text() const {
  switch (kind_) {
    case Kind::type:
      return type_name(number_);
    case Kind::flag:
      return number_ ? "true" : "false";
    case Kind::word:
      return "uint" + std::to_string(8 * number_) + "_t";
    case Kind::row: {
      const Format format{&formats()[number_], static_cast<FloatType>(first_)};
      return with_family(format.family(), [&]<class Tag>(Tag) {
        return RowOf<Tag::value>::type::shader(
            format, type_name(first_), second_);
      });
    }
    case Kind::row_of_fours:
      return "Dense<" + type_name(number_) + ", true>";
    case Kind::packing:
      return static_cast<RowFormat>(number_) == RowFormat::fp8
          ? "glm_fused::Fp8Packing"
          : "glm_fused::Int8Packing";
    case Kind::cached_rows:
      return rows_name(first_, second_, number_);
    default:
      return std::to_string(number_);
  }
}

KernelName::KernelName(
    const char* source,
    const char* function,
    std::initializer_list<Argument> arguments)
    : source_(source), function_(function) {
  for (const Argument& argument : arguments) {
    add(argument);
  }
}

void KernelName::add(Argument argument) {
  if (count_ == kMost) {
    throw std::runtime_error(
        std::string("[metal] ") + function_ + " has too many arguments.");
  }
  arguments_[count_++] = argument;
}

std::string KernelName::function() const {
  std::string text = function_;
  for (size_t i = 0; i < count_; i++) {
    text += (i == 0 ? "<" : ", ") + arguments_[i].text();
  }
  return count_ == 0 ? text : text + ">";
}

std::string KernelName::host() const {
  std::string text = function();
  std::replace_if(
      text.begin(),
      text.end(),
      [](unsigned char c) { return !std::isalnum(c); },
      '_');
  return count_ == 0 ? text : "glm_fused_" + text;
}

std::string KernelName::library() const {
  return count_ == 0 ? "glm_fused_" + host() : host();
}

std::string KernelName::instance() const {
  if (count_ == 0) {
    return "";
  }
  const std::string text = function();
  return "template [[host_name(\"" + host() + "\")]] [[kernel]] decltype(" +
      text + ") " + text + ";\n";
}

size_t KernelName::hash() const {
  uint64_t hash = reinterpret_cast<uintptr_t>(function_);
  for (size_t i = 0; i < count_; i++) {
    hash = (hash ^ arguments_[i].bits()) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace glm_fused::metal
