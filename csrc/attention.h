// The arithmetic of indexer_topk and sparse_mla_decode, the same on every
// backend, but for a prompt on Metal: its matrix units have their own order of
// sums. Everything is fp32, rounded at each step; fma(a, b, c) = a b + c rounds
// once, a chain starts at +0, and nothing is reordered. `scale` is the op's
// argument rounded to fp32.
//
// A query at column c of the cache sees the keys [start, c]. Keys are `Rows`
// (row_layout.h); k[d] below is a row's value as fp32.
//
// indexer_topk, per query and visible key:
//   dot[h] = chain over d = 0, 1, …     of fma(q[h][d], k[d], dot[h])
//   r[h]   = max(dot[h] * scale, 0)     a NaN stays NaN
//   score  = chain over h = 0, 1, …     of fma(w[h], r[h], score), w[h] being
//            the weight times `weight_scale`, rounded
// -0 counts as 0 and NaN as -infinity. The k largest are chosen, among equal
// ones the lowest index, and written in ascending order; where fewer than k
// keys are visible all of them are, scores unseen, then -1.
//
// sparse_mla_decode, per query and head, over its list of keys (the selection,
// or every visible key). Entry i of the list belongs to split i / kSplit;
// entries that are no visible key are skipped, and so are splits without keys.
//   s      = chain over d = 0, 1, … of fma(q[d], k[d], s), then times scale;
//            first the rank columns, then RoPE's
//   m      = max of the split's s
//   p      = exp_negative(s - m), metal/softmax_exp.h
//   l      = sum of the split's p, in order, from 0
//   o[c]   = chain over the split's keys of fma(p, k[c], o[c]), c < rank
// and then over the splits in order:
//   M      = max of all m
//   e      = exp_negative(m - M)
//   L      = chain of fma(e, l, L)
//   out[c] = (chain of fma(e, o[c], out[c])) / L
// A query without visible keys gives zeros.
#pragma once

namespace glm_fused {

constexpr int kSplit = 64;  // list entries in a split

}  // namespace glm_fused
