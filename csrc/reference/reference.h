// These plain loops are the unfused chain, which the fused kernels must equal
// bit for bit. They take one simdgroup lane at a time, round once per step and
// keep MLX's order.
#pragma once

#include "attention.h"
#include "cpu/attention/indexer_topk.h"
#include "cpu/attention/sparse_mla_decode.h"
#include "cpu/dot/moe_decode.h"

namespace glm_fused::reference {

void quantized_matvec(
    const cpu::Matrix& w,
    const mlx::core::array& x,
    mlx::core::array& y);

void moe_decode(const cpu::Moe& moe);

// Writes y[t, i], the row of slot slots[t, i] of w times x[t], or times x[t, i]
// where x is [t, top_k, k].
void expert_matvec(
    const cpu::Matrix& w,
    const mlx::core::array& x,
    const mlx::core::array& slots,
    mlx::core::array& y);

void indexer_topk(const cpu::Indexer& a);

void sparse_mla_decode(const cpu::Mla& a);

// Writes the norms of x's rows to y; `bias` is null for an RMSNorm.
void norm(
    const mlx::core::array& x,
    const mlx::core::array& weight,
    const mlx::core::array* bias,
    float eps,
    mlx::core::array& y);

void rotate(
    const mlx::core::array& x,
    const mlx::core::array& cosines,
    const mlx::core::array& sines,
    bool interleaved,
    mlx::core::array& y);

// Writes the fp32 logits [tokens, experts] of x [tokens, hidden].
void router_logits(
    const cpu::Matrix& w,
    const mlx::core::array& x,
    float* logits);

// Returns one row of slot `slot` of w times x, before rounding to the output
// type.
float dot(const cpu::Matrix& w, int slot, int row, const float* x);

}  // namespace glm_fused::reference
