// The long-context kernels are reached through one table per instruction set.
// attention.h says what they compute.
#pragma once

#include <cstdint>

#include "attention.h"
#include "row_layout.h"

namespace glm_fused::cpu {

// What index_scores takes: keys [begin, end) of `count` and a few queries of
// one sequence.
struct IndexArgs {
  const float* q;        // queries, each as index_pack lays it out
  const float* weights;  // [queries, heads]
  int queries, heads, dim;
  float scale;
  Rows keys;
  int begin, end, count;
  const int* low;  // query i sees the keys [low[i], high[i])
  const int* high;
  uint32_t* scores;  // [queries, stride], as ordered words; key t is column t
  size_t stride;
  float* spare;  // has index_spare's size
};

// Vectors of so few heads would be almost empty: keys are the lanes then.
constexpr int kFewHeads = 8;

// What attention over one split takes, for one query token.
struct SplitArgs {
  // [rank + rope, lanes]: transposed, heads padded to lanes; of kFewHeads or
  // fewer: [heads, rank + rope].
  const float* q;
  int heads, lanes;
  float scale;
  const Rows* rows;
  const int32_t* keys;
  int count;       // 1 to kSplit
  int next_count;  // further keys, which are fetched from memory meanwhile
  float* p;        // [count, lanes]
  float* m;        // [lanes]
  float* l;        // [lanes]
};

// What combining splits takes, for one query token and some columns. Splits
// without keys are left out.
struct CombineArgs {
  const Rows* rows;
  const int32_t* keys;  // those of all splits, back to back
  const int* counts;    // how many keys each split has
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
  // Tells how many floats a packed query takes, and packs q [heads, dim].
  size_t (*index_packed)(int heads, int dim);
  void (*index_pack)(const float* q, int heads, int dim, float* packed);
  void (*index_scores)(const IndexArgs&);
  size_t (*index_spare)(int queries, int heads);
  // Writes the ascending indices of the k largest of words[0, count); among
  // equals the lowest indices win. 0 < k < count, and `spare` holds count + 16
  // words.
  void (*select)(
      const uint32_t* words,
      int count,
      int k,
      uint32_t* spare,
      int32_t* out);
  // Writes q [lanes, width], after which 15 more floats can be read, to
  // to [width, lanes]; lanes are a multiple of 16.
  void (*transpose)(const float* q, int width, int lanes, float* to);
  void (*split)(const SplitArgs&);
  // Computes e [splits, lanes] and total [lanes], which is attention.h's L.
  void (*weigh)(const CombineArgs&, float* e, float* total);
  void (*combine)(const CombineArgs&);
  // Does `count` rounds of independent multiply-adds in registers; returns how
  // many scalar multiply-adds one round is. Benchmarks measure against it.
  int (*multiply_adds)(int64_t count, float* result);
};

const AttentionKernels& portable_attention();
#if defined(__x86_64__)
const AttentionKernels& avx2_attention();
const AttentionKernels& avx512_attention();
#endif

// Returns the table for the instruction set that kernels() chose.
const AttentionKernels& attention_kernels();

// Does `rounds` rounds of AttentionKernels::multiply_adds on every thread;
// returns how many multiply-adds that was.
double multiply_adds(int64_t rounds);

}  // namespace glm_fused::cpu
