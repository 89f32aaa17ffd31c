// Selects the k largest words exactly: of many, in three passes over digits of
// 11, 11 and 10 bits, whose candidates are at most all words, so that nothing
// can overflow, and equal words share every digit; of few, bit by bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention/attention_simd.h"

namespace {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

// Returns the digit of the k-th largest word, and subtracts from k the words
// whose digit is larger.
inline uint32_t kth_digit(const uint32_t* words, int count, int shift, int& k) {
  // With one histogram, equal neighbours would wait for each other's store.
  constexpr int kWays = 4;
  uint32_t histogram[kWays][kDigits] = {};
  for (int i = 0; i < count; i++) {
    histogram[i % kWays][words[i] >> shift & (kDigits - 1)]++;
  }
  for (int digit = kDigits - 1;; digit--) {
    int here = 0;
    for (int way = 0; way < kWays; way++) {
      here += static_cast<int>(histogram[way][digit]);
    }
    if (here >= k) {
      return static_cast<uint32_t>(digit);
    }
    k -= here;
  }
}

// Calls each(first, keep_below) for vectors of words; the last may be partial.
template <class Fn>
GLM_INLINE void each_vector(const uint32_t* words, int count, Fn&& each) {
  int i = 0;
  for (; i + kHalf <= count; i += kHalf) {
    each(load_words(words + i), i, 0xffffu);
  }
  if (i < count) {
    uint32_t tail[kHalf] = {};
    std::copy(words + i, words + count, tail);
    each(load_words(tail), i, (1u << (count - i)) - 1);
  }
}

// Copies the words whose bits from `shift` up equal `prefix`, in order, and
// returns how many there are. `to` holds count + kHalf words and may be `from`.
template <int shift>
inline int
keep_prefix(const uint32_t* from, int count, uint32_t prefix, uint32_t* to) {
  int kept = 0;
  each_vector(from, count, [&](U16 words, int, uint32_t valid) {
    const uint32_t keep = equal_to(shift_right<shift>(words), prefix) & valid;
    if (keep) {
      kept += pack_words(words, keep, to + kept);
    }
  });
  return kept;
}

// To clear and to walk the histograms of the digits costs as much as to look at
// so many words for each of their bits.
constexpr int kFewWords = 1024;

// Does what kth_word does, for few words.
inline uint32_t kth_of_few(const uint32_t* words, int count, int& k) {
  const auto count_if = [&](const auto& holds) {
    int found = 0;
    each_vector(words, count, [&](U16 v, int, uint32_t valid) {
      found += __builtin_popcount(holds(v) & valid);
    });
    return found;
  };
  uint32_t kth = 0;
  for (uint32_t bit = 1u << 31; bit > 0; bit >>= 1) {
    const uint32_t below = (kth | bit) - 1;
    if (count_if([&](U16 v) { return above(v, below); }) >= k) {
      kth |= bit;
    }
  }
  k -= count_if([&](U16 v) { return above(v, kth); });
  return kth;
}

// Returns the k-th largest word; k becomes how many words equal to it are
// wanted.
inline uint32_t
kth_word(const uint32_t* words, int count, int& k, uint32_t* spare) {
  if (count <= kFewWords) {
    return kth_of_few(words, count, k);
  }
  const uint32_t top = kth_digit(words, count, 21, k);
  count = keep_prefix<21>(words, count, top, spare);
  const uint32_t middle = kth_digit(spare, count, 10, k) | top << kDigitBits;
  count = keep_prefix<10>(spare, count, middle, spare);
  // The words here have the same middle digit, into which 11 bits reach by one.
  const uint32_t low = kth_digit(spare, count, 0, k) & 1023u;
  return middle << 10 | low;
}

// Returns the lowest `count` of the bits that are set.
inline uint32_t lowest_bits(uint32_t bits, int count) {
  uint32_t rest = bits;
  for (; count > 0 && rest; count--) {
    rest &= rest - 1;
  }
  return bits ^ rest;
}

inline void
select(const uint32_t* words, int count, int k, uint32_t* spare, int32_t* out) {
  int equal = k, taken = 0;
  const uint32_t kth = kth_word(words, count, equal, spare);
  each_vector(words, count, [&](U16 v, int first, uint32_t valid) {
    uint32_t ties = equal_to(v, kth) & valid;
    if (ties) {
      ties = lowest_bits(ties, equal);
      equal -= __builtin_popcount(ties);
    }
    const uint32_t keep = (above(v, kth) & valid) | ties;
    if (keep && taken + kHalf <= k) {
      taken += pack_words(ascending(first), keep, out + taken);
    } else if (keep) {
      int32_t last[kHalf];
      const int here = pack_words(ascending(first), keep, last);
      std::copy_n(last, here, out + taken);
      taken += here;
    }
  });
}

}  // namespace
