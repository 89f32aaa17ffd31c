"""Low-rank adapters of routed experts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRASwitchLinear

from .. import ops


class AdaptedExperts(LoRASwitchLinear):
    """mlx-lm's adapter around one of this package's stacks of experts."""

    @staticmethod
    def from_base(
        linear: nn.Module, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> AdaptedExperts:
        """An adapter of rank ``r`` that changes nothing yet."""
        inputs, outputs, experts = linear.input_dims, linear.output_dims, linear.num_experts
        adapted = AdaptedExperts(inputs, outputs, experts, r, dropout, scale)
        adapted.linear = linear  # type: ignore[assignment]
        return adapted

    def as_weight(self) -> None:
        """None, because a weight of ``ops.moe_decode`` has no place for an adapter."""


def adapted_experts(
    projections: tuple[nn.Module, nn.Module, nn.Module],
    x: mx.array,
    experts: mx.array,
    scores: mx.array,
) -> mx.array:
    """Compute ``ops.moe_decode`` one projection at a time, where any of them has an adapter.

    It takes x [n, hidden], experts and scores [n, top_k], and returns [n, hidden] in x's dtype.
    Rows are sorted by expert, so that each expert's weights are read once.
    """
    gate, up, down = projections
    chosen = mx.stop_gradient(experts).reshape(-1)
    order = mx.argsort(chosen)
    chosen = chosen[order]
    rows = x[order // experts.shape[1]][:, None]
    act = ops.swiglu(gate(rows, chosen, True), up(rows, chosen, True))
    y = down(act, chosen, True)[mx.argsort(order)]
    return ops.expert_sum(y.reshape(*experts.shape, -1), scores)
