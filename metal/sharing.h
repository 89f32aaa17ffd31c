// Finds the pairs (token, choice), numbered token * top_k + choice, that share
// a slot.
#pragma once

#include "numbers.h"

// A slot's pairs are cut, in order, into groups of up to `most`; the first
// pair of each leads it. One thread finds, for `pair`, whether it leads a
// group and which pair follows it in its slot; `pairs` stands for none.
struct Link {
  bool leads;
  int next;
};

METAL_FUNC Link
link_of(const device int* slots, int pairs, int pair, int most) {
  const int slot = slots[pair];
  int earlier = 0;
  for (int q = 0; q < pair; q++) {
    earlier += slots[q] == slot;
  }
  int next = pairs;
  for (int q = pairs - 1; q > pair; q--) {
    next = slots[q] == slot ? q : next;
  }
  return {earlier % most == 0, next};
}

// A Group has the members of the group that a pair leads, or count 0 if it
// leads none. Past the count the leader is repeated. Where groups hold one
// pair, every pair leads and there are no links.
template <int most>
struct Group {
  int members[most];
  int count;
};

template <int most>
METAL_FUNC Group<most>
group_from(const threadgroup int* links, int pairs, int pair) {
  Group<most> group;
  group.members[0] = pair;
  if constexpr (most == 1) {
    group.count = 1;
    return group;
  }
  group.count = links[pair] % 2;
  int next = links[pair] / 2;
  GLM_UNROLL
  for (int i = 1; i < most; i++) {
    const bool member = group.count > 0 && next < pairs;
    group.members[i] = member ? next : pair;
    group.count += member;
    next = member ? links[next] / 2 : pairs;
  }
  return group;
}

// Gives the group of all tokens, of which there are at most `most`.
template <int most>
METAL_FUNC Group<most> all_tokens(int tokens) {
  Group<most> group;
  GLM_UNROLL
  for (int i = 0; i < most; i++) {
    group.members[i] = min(i, tokens - 1);
  }
  group.count = tokens;
  return group;
}
