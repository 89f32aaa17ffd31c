// What the launches of the lightning indexer share: scores, words that compare
// as they do, and lists of how often their first digits occur.
#pragma once

#include "numbers.h"

GLM_CONST int kScoreThreads = 128;
GLM_CONST int kScoreKeys = 2 * kScoreThreads;  // a threadgroup scores so many
GLM_CONST int kDigitBits = 11;
GLM_CONST int kDigits = 1 << kDigitBits;
GLM_CONST int kFirstShift = 32 - kDigitBits;
// A simdgroup of scores lists its words' first digits: how many distinct ones
// there are, then each, with its count above it.
GLM_CONST int kLists = kScoreThreads / kLanes;  // of a threadgroup
GLM_CONST int kListWords = 1 + kScoreKeys / kLists;

METAL_FUNC float relu(float x) {
  return x < 0 ? 0.0f : x;  // a NaN stays one
}

// Gives words that compare as the scores do: -0 as 0, NaN as -infinity. None is
// 0.
METAL_FUNC uint ordered(float score) {
  const uint bits = as_type<uint>(isnan(score) ? -INFINITY : score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Gives where the lists of a query, of which this dispatch has others before
// it, begin. Its scores take `columns` words, of whole threadgroups.
METAL_FUNC size_t first_list(int query, int columns) {
  return size_t(query) * (columns / kScoreKeys) * kLists * kListWords;
}

// Lists the first digits of a simdgroup's words, two a lane; 0 is none.
METAL_FUNC void
list_digits(uint first, uint second, device uint* list, int lane) {
  // One more than a digit, so that a lane without a word has the least.
  thread uint left[2] = {
      first == 0 ? 0 : (first >> kFirstShift) + 1,
      second == 0 ? 0 : (second >> kFirstShift) + 1};
  int count = 0;
  while (true) {
    const uint most = simd_max(max(left[0], left[1]));
    if (most == 0) {
      break;
    }
    const uint alike = simd_sum(uint(left[0] == most) + uint(left[1] == most));
    count++;
    if (lane == 0) {
      list[count] = (most - 1) | alike << kDigitBits;
    }
    left[0] = left[0] == most ? 0 : left[0];
    left[1] = left[1] == most ? 0 : left[1];
  }
  if (lane == 0) {
    list[0] = count;
  }
}
