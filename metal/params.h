// Constants of one dispatch, as host and shader see them.
#pragma once

struct MoeParams {
  int tokens;  // 1 to 16
  int top_k;
  int hidden;
  int intermediate;
  int bank;  // slots in the weight arrays
};

struct RouterParams {
  int hidden;
  int top_k;
  int topk_group;
  int norm_topk_prob;
  float routed_scaling_factor;
};
