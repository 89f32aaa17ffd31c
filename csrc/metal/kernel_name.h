// Kernels by name: a function of a shader and its template arguments, as values
// that are cheap to make and to compare.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "formats/format.h"
#include "mlx/mlx.h"
#include "row_layout.h"

namespace glm_fused::metal {

namespace mx = mlx::core;

// A template argument.
class Argument {
 public:
  Argument() = default;
  Argument(mx::Dtype type);  // float32, float16 or bfloat16
  Argument(bool flag) : kind_(Kind::flag), number_(flag) {}
  Argument(int number) : kind_(Kind::number), number_(number) {}

  // Gives the unsigned integer of as many bytes.
  static Argument word(int bytes);
  // Gives the rows of a weight in the order that MLX takes for [n, k].
  static Argument row(const Format& format, int n, int k);
  // Gives rows of dense values of which four are read at once.
  static Argument row_of_fours(mx::Dtype type);
  // Gives how rows of a format that is not floating are packed.
  static Argument packing(RowFormat format);
  // Gives cached rows in `latents` and, if there, `ropes`.
  static Argument cached_rows(
      const RowLayout& layout,
      const mx::array& latents,
      const mx::array* ropes);

  // As the shader spells it.
  std::string text() const;

  bool operator==(const Argument&) const = default;
  uint64_t bits() const {
    return uint64_t(kind_) << 56 | uint64_t(first_) << 48 |
        uint64_t(second_) << 40 | static_cast<uint32_t>(number_);
  }

 private:
  enum class Kind : uint8_t {
    none,
    type,
    flag,
    number,
    word,
    row,
    row_of_fours,
    packing,
    cached_rows
  };
  Argument(Kind kind, int first, int second, int number)
      : kind_(kind),
        first_(static_cast<uint8_t>(first)),
        second_(static_cast<uint8_t>(second)),
        number_(number) {}

  Kind kind_ = Kind::none;
  uint8_t first_ = 0, second_ = 0;
  int32_t number_ = 0;
};

class KernelName {
 public:
  // Both texts have to live for ever: they are compared by their addresses.
  KernelName(
      const char* source,
      const char* function,
      std::initializer_list<Argument> arguments = {});

  void add(Argument argument);

  const char* source() const {
    return source_;
  }
  // Gives "index_select", or "moe_down_sum<half, Dense<half>, 4, 1>".
  std::string function() const;
  // Gives the name by which the kernel is found, and its library's, too.
  std::string host() const;
  std::string library() const;
  // Gives the line that makes the instance of a template; "" for a function.
  std::string instance() const;

  bool operator==(const KernelName&) const = default;
  size_t hash() const;

 private:
  static constexpr int kMost = 14;

  const char* source_;
  const char* function_;
  size_t count_ = 0;
  std::array<Argument, kMost> arguments_{};
};

}  // namespace glm_fused::metal
