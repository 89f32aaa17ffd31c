// Fetches the rows that a kernel needs next from memory while it is at work.
// This is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "row_layout.h"

namespace {

using namespace glm_fused;

// All rows are met at once in the beginning, as the look-ups of their pages
// then overlap: a core waits for each, even that of a line it need not wait
// for. Then a step asks for a few lines, since of many most would wait for the
// others.
class RowFetch {
 public:
  // Fetches columns [begin, begin + columns) of the latents of `count` rows,
  // with their scales and, if asked for, their RoPE parts, in so many steps.
  RowFetch(
      const Rows& rows,
      const int32_t* keys,
      int count,
      int begin,
      int columns,
      bool ropes,
      int steps)
      : rows_(rows), keys_(keys), left_(count) {
    if (rows.format == RowFormat::floating) {
      const size_t size = size_of(rows.latent_type);
      begin_ = begin * size;
      latent_ = columns * size;
      rest_ = ropes ? rows.rope_dim * size_of(rows.rope_type) : 0;
    } else {
      begin_ = begin;
      latent_ = columns;
      rest_ =
          packed_row_bytes(rows.format, rows.rank, rows.rope_dim) - rows.rank;
    }
    const size_t lines = most_lines(latent_) + most_lines(rest_);
    share_ = (count * lines + steps - 1) / steps;
    for (int i = 0; i < count; i++) {
      const Row row = rows[keys[i]];
      fetch_ends(row.latent + begin_, latent_);
      if (rest_ > 0) {
        fetch_ends(rest_of(row), rest_);
      }
    }
  }

  void step() {
    for (size_t i = 0; i < share_; i++) {
      if (at_ >= end_ && !next_part()) {
        return;
      }
      fetch(at_);
      at_ += kLine;
    }
  }

 private:
  static constexpr size_t kLine = 64;

  // Of bytes that may begin anywhere in a line.
  static size_t most_lines(size_t bytes) {
    return bytes > 0 ? (bytes - 1) / kLine + 2 : 0;
  }
  static void fetch(const uint8_t* line) {
    __builtin_prefetch(line, 0, 2);
  }
  static void fetch_ends(const uint8_t* from, size_t bytes) {
    fetch(from);
    fetch(from + bytes - 1);
  }
  // The scales, or what is stored apart.
  static const uint8_t* rest_of(const Row& row) {
    return row.scales ? row.scales : row.rope;
  }

  // Goes on to the rest of the row or to the next one.
  bool next_part() {
    if (rest_at_) {
      set_part(rest_at_, rest_);
      rest_at_ = nullptr;
      return true;
    }
    if (left_ == 0) {
      return false;
    }
    const Row row = rows_[*keys_++];
    left_--;
    set_part(row.latent + begin_, latent_);
    if (rest_ > 0) {
      rest_at_ = rest_of(row);
    }
    return true;
  }
  void set_part(const uint8_t* from, size_t bytes) {
    at_ = from - reinterpret_cast<uintptr_t>(from) % kLine;
    end_ = from + bytes;
  }

  const Rows& rows_;
  const int32_t* keys_;
  int left_;  // rows
  size_t begin_, latent_, rest_, share_;
  const uint8_t *at_ = nullptr, *end_ = nullptr, *rest_at_ = nullptr;
};

}  // namespace
