// These are the constants of one dispatch, as host and shader see them.
#pragma once

struct MoeParams {
  int tokens;  // 1 to 16
  int top_k;
  int hidden;
  int intermediate;
  int bank;  // slots in the weight arrays
};

struct RouterParams {
  int tokens;
  int hidden;
  int experts;
  int top_k;
  int topk_group;
  int norm_topk_prob;
  float routed_scaling_factor;
};

// Tells where cached rows lie, with strides in bytes. Packed rows
// (csrc/row_layout.h) have no `ropes` of their own.
struct RowsParams {
  int keys;     // in each sequence
  int queries;  // in each sequence; they belong to its last keys
  int rank;     // how many values a latent, or an indexer key, has
  int rope;
  long latent_stride;  // from row to row
  long rope_stride;
  long latent_sequence;  // from sequence to sequence
  long rope_sequence;
};

struct MlaParams {
  RowsParams rows;
  int first_token;  // this dispatch begins with it
  int heads;
  int listed;  // entries per token in `selected`; 0 takes every visible key
  int splits;
  float scale;
};

struct IndexParams {
  RowsParams rows;
  int b;            // the sequence
  int first_query;  // this dispatch begins with it
  int heads;
  int top_k;
  float scale;
};

// An array [sequences, heads, length, columns] with strides in values.
struct ViewParams {
  int heads;
  int length;
  int columns;
  long sequence_stride;
  long head_stride;
  long position_stride;
  long column_stride;
};

// Both have the same shape.
struct CopyParams {
  ViewParams from;
  ViewParams to;
};

struct NormParams {
  ViewParams x;
  float eps;
};

struct RotateParams {
  ViewParams x;
  ViewParams cosines;  // [b or 1, 1, l, pairs]
  ViewParams sines;
  int interleaved;
};
