// These are the constants of one dispatch, as host and shader see them.
#pragma once

struct MoeParams {
  int tokens;
  int top_k;
  int hidden;
  int intermediate;
  int bank;                 // slots in the weight arrays
  int shared_intermediate;  // of experts that all tokens take
  int adds;                 // whether there is a residual
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
  int count;        // of this dispatch's queries
  int heads;
  int top_k;
  int columns;  // words of a query: its keys, in whole threadgroups
  float scale;
  float weight_scale;
};

// A launch of the selection; words of a query begin at multiples of `columns`.
struct SelectParams {
  IndexParams index;
  int columns;
  int count;         // of a query's words
  int stretch;       // a threadgroup takes so many
  int kept_columns;  // of what is kept of a query
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

// Where rows are packed from and to; `to` counts bytes.
struct PackParams {
  ViewParams values;
  ViewParams ropes;  // of no columns where rows have no RoPE part
  ViewParams to;
  int tile;  // values that share a scale
  int scales;
};

struct NormParams {
  ViewParams x;
  float eps;
};

// One of a launch's products; strides are in values.
struct ProductParams {
  int first_group;   // of threadgroups, along the rows
  int rows;          // of each head
  int token_stride;  // of the output
  int head_stride;
  int wide;  // whether it is stored as fp32
};

struct ProjectParams {
  int tokens;
  int columns;
  int token_stride;  // of x
  int head_stride;
  int adds;    // whether there is a residual
  int groups;  // of threadgroups that the products take
  float eps;
  ProductParams products[4];
};

struct RotateParams {
  ViewParams x;
  ViewParams cosines;  // [b or 1, 1, l, pairs]
  ViewParams sines;
  int interleaved;
};

// What attention does after its projections; strides are in values.
struct AttentionParams {
  int tokens;
  int heads;
  int nope;
  int rank;
  int rope;
  int index_heads;  // 0: their queries are not wanted
  int index_dim;    // 0: there is no indexer
  int interleaved;  // of the indexer
  int rows;         // of a token, that are normed or rotated
  int head_groups;  // threadgroups for a head's matrix
  float eps;        // of the latents' norm
  float index_eps;
  ProductParams product;  // of embed_q
  ViewParams cosines;     // [b or 1, 1, l, pairs]
  ViewParams sines;
};

// What follows attention's splits; strides are in values.
struct UnembedParams {
  MlaParams mla;
  int tokens;             // of this dispatch
  ProductParams product;  // of unembed_out
};
