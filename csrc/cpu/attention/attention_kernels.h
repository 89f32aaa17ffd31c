// The seam of the long-context kernels: one table per instruction set. What
// they compute is in attention.h.
#pragma once

#include <cstdint>

#include "attention.h"
#include "row_layout.h"

namespace glm_fused::cpu {

// Scores of keys [begin, end) for a few queries of one sequence.
struct IndexArgs {
  const float* q;        // per query, as IndexPack lays it out
  const float* weights;  // [queries, heads]
  int queries, heads, dim;
  float scale;
  Rows keys;
  int begin, end;
  const int* low;  // query i sees the keys [low[i], high[i])
  const int* high;
  uint32_t* scores;  // [queries, stride], as ordered words; key t is column t
  size_t stride;
  float* spare;  // of index_spare's size
};

// One query token's attention over one split.
struct SplitArgs {
  const float* q;  // [rank + rope, lanes]: transposed, heads padded to lanes
  int lanes;
  float scale;
  const Rows* rows;
  const int32_t* keys;
  int count;       // 1 to kSplit
  int next_count;  // further keys, to be fetched from memory meanwhile
  float* p;        // [count, lanes]
  float* m;        // [lanes]
  float* l;        // [lanes]
};

// One query token's splits, those without keys left out; for some columns.
struct CombineArgs {
  const Rows* rows;
  const int32_t* keys;  // of all splits, back to back
  const int* counts;    // of each
  int splits;
  int heads, lanes;
  const float* p;      // [all keys, lanes]
  const float* m;      // [splits, lanes]
  const float* l;      // [splits, lanes]
  const float* e;      // [splits, lanes]
  const float* total;  // [lanes]
  int column, columns;
  float* sums;  // [heads, columns rounded up to 16]
  float* out;   // [heads, rank]
};

struct AttentionKernels {
  const char* name;
  // Floats that one packed query takes, and the packing of q [heads, dim].
  size_t (*index_packed)(int heads, int dim);
  void (*index_pack)(const float* q, int heads, int dim, float* packed);
  void (*index_scores)(const IndexArgs&);
  size_t (*index_spare)(int queries, int heads);
  // Ascending indices of the k largest of words[0, count), the lowest index
  // first among equals; 0 < k < count. `spare` holds count + 16 words.
  void (*select)(
      const uint32_t* words,
      int count,
      int k,
      uint32_t* spare,
      int32_t* out);
  void (*split)(const SplitArgs&);
  // e [splits, lanes] and total [lanes], attention.h's L.
  void (*weigh)(const CombineArgs&, float* e, float* total);
  void (*combine)(const CombineArgs&);
  // `count` rounds of independent register-only multiply-adds; returns how many
  // scalar multiply-adds one round is. The yardstick of benchmarks.
  int (*multiply_adds)(int64_t count, float* result);
};

const AttentionKernels& portable_attention();
#if defined(__x86_64__)
const AttentionKernels& avx2_attention();
const AttentionKernels& avx512_attention();
#endif

// The table for the instruction set that kernels() chose.
const AttentionKernels& attention_kernels();

// `rounds` of AttentionKernels::multiply_adds on every thread; how many
// multiply-adds that was.
double multiply_adds(int64_t rounds);

}  // namespace glm_fused::cpu
