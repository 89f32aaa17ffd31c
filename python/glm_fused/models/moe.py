"""Routed experts plus shared experts."""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .. import _ext, ops
from .config import ModelArgs
from .layer_spec import LayerSpec
from .layers import MLP, RMSNorm, SwitchLinear, keeps_dtype

Meanwhile = Callable[[mx.array], mx.array]
Arrays = list[mx.array]
Weights = tuple[ops.Weight, ops.Weight, ops.Weight]  # of gate, up and down
Norm = tuple[mx.array, float]  # its weight and eps


class RoutedExperts(Protocol):
    """The routed experts of one layer, wherever their weights are.

    `SwitchMLP` holds them all in memory. Whatever takes its place in `MoE.switch_mlp` has to give
    the same bits.
    """

    def weights(self) -> tuple[ops.Weight | None, ops.Weight | None, ops.Weight | None]:
        """The weights of gate and up [n, intermediate, hidden] and down [n, hidden, intermediate].

        ``n`` counts the experts that are in memory; None stands for a projection with a trained
        adapter.
        """

    def takes_at_once(self, choices: int) -> bool:
        """Whether a call with so many ``experts``, of all tokens together, awaits nothing."""

    def __call__(
        self, x: mx.array, experts: mx.array, scores: mx.array, meanwhile: Meanwhile
    ) -> tuple[mx.array, mx.array]:
        """The weighted sum of each token's experts, and what is computed beside it.

        Args:
            x: float32, float16 or bfloat16 [tokens, hidden].
            experts: int32 [tokens, top_k], each in [0, experts of the layer).
            scores: float32 [tokens, top_k].
            meanwhile: a function of x [tokens, hidden], whose work fills the time that experts may
                take to arrive; where they are streamed, its x is ready once their reads have begun.

        Returns:
            [tokens, hidden] in x's dtype, and ``meanwhile(x)``.

        Raises:
            RuntimeError: an expert cannot be had, when the result is evaluated or before.
        """

    def part(
        self,
        x: mx.array,
        experts: mx.array,
        scores: mx.array,
        meanwhile: Callable[[mx.array], Arrays],
        join: Callable[[Arrays], Arrays],
    ) -> tuple[mx.array, Arrays]:
        """A call, of experts of which each of several ranks has rows, and all make the same call.

        Args:
            meanwhile: of other experts that every token takes the rank's part of activations, if
                there are any.
            join: what all ranks have of activations, the chosen experts' [tokens, top_k, part] and
                then maybe those of ``meanwhile``.

        Returns:
            The rank's columns of the weighted sum, and what ``join`` made of ``meanwhile(x)``.
        """

    def block(
        self, router: "Router", x: mx.array, norm: Norm, shared: Weights | None
    ) -> mx.array | None:
        """`Router.block` with these experts, for an x that it takes; None where they have none.

        ``shared`` are the weights of the experts that every token takes.
        """


class Router(nn.Module):
    """Chooses experts by biased sigmoid score and weighs them by the unbiased one."""

    def __init__(self, args: ModelArgs, experts: int):
        super().__init__()
        self.weight = mx.zeros((experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((experts,))
        self._routing: dict[str, Any] = {
            "top_k": args.num_experts_per_tok,
            "n_group": args.n_group,
            "topk_group": args.topk_group,
            "norm_topk_prob": args.norm_topk_prob,
            "routed_scaling_factor": args.routed_scaling_factor,
        }

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts int32 [n, top_k] and scores float32 [n, top_k] of x [n, hidden]."""
        return ops.router_topk(x, self.weight, self._bias(), **self._routing)

    def takes_block(self, x: mx.array) -> bool:
        """Whether `block` runs for x [b, l, hidden]."""
        return ops.blocks.takes_experts(x, self.weight.shape[0], self._routing["top_k"])

    def block(
        self,
        x: mx.array,
        norm: Norm,
        experts: Weights,
        shared: Weights | None,
        use: _ext.SlotUse | None = None,
    ) -> mx.array:
        """The half of a layer that the router is in; see `glm_fused.ops.blocks.moe_block`."""
        router = self.weight, self._bias()
        return ops.blocks.moe_block(x, norm, router, experts, shared, use=use, **self._routing)

    def choices(self, x: mx.array) -> int:
        """How many experts it chooses for the tokens of x [b, l, hidden]."""
        return x.shape[0] * x.shape[1] * int(self._routing["top_k"])

    def _bias(self) -> mx.array:
        return self.e_score_correction_bias.astype(mx.float32)


class SwitchMLP(nn.Module):
    """`RoutedExperts` in memory: the stacked weights of all of them."""

    def __init__(self, hidden: int, intermediate: int, experts: int):
        super().__init__()
        self.gate_proj = SwitchLinear(hidden, intermediate, experts)
        self.up_proj = SwitchLinear(hidden, intermediate, experts)
        self.down_proj = SwitchLinear(intermediate, hidden, experts)

    def weights(self) -> tuple[ops.Weight | None, ops.Weight | None, ops.Weight | None]:
        """The weights [experts, …] of gate, up and down; None for one with a trained adapter."""
        return self.gate_proj.as_weight(), self.up_proj.as_weight(), self.down_proj.as_weight()

    def takes_at_once(self, choices: int) -> bool:
        """Always; see `RoutedExperts`."""
        return True

    def __call__(
        self, x: mx.array, experts: mx.array, scores: mx.array, meanwhile: Meanwhile
    ) -> tuple[mx.array, mx.array]:
        """The sum [n, hidden] of each row's experts, and ``meanwhile(x)``; see `RoutedExperts`."""
        gate, up, down = self.weights()
        if gate is None or up is None or down is None:
            from .lora import adapted_experts

            projections = self.gate_proj, self.up_proj, self.down_proj
            return adapted_experts(projections, x, experts, scores), meanwhile(x)
        return ops.moe_decode(x, gate, up, down, experts, scores), meanwhile(x)

    def part(
        self,
        x: mx.array,
        experts: mx.array,
        scores: mx.array,
        meanwhile: Callable[[mx.array], Arrays],
        join: Callable[[Arrays], Arrays],
    ) -> tuple[mx.array, Arrays]:
        """As `RoutedExperts`."""
        gate, up, down = self.weights()
        assert gate is not None and up is not None and down is not None  # nothing trains a part
        joined, *other = join([activations(x, gate, up, experts), *meanwhile(x)])
        return ops.expert_sum(ops.expert_matvec(joined, down, experts), scores), other

    def block(
        self, router: Router, x: mx.array, norm: Norm, shared: Weights | None
    ) -> mx.array | None:
        """`Router.block` with these experts, unless one has an adapter; see `RoutedExperts`."""
        gate, up, down = self.weights()
        if gate is None or up is None or down is None:
            return None
        return router.block(x, norm, (gate, up, down), shared)


def activations(x: mx.array, gate: ops.Weight, up: ops.Weight, slots: mx.array) -> mx.array:
    """Of experts, for each choice of a slot [tokens, top_k] by x: [tokens, top_k, rows of gate]."""
    return ops.swiglu(ops.expert_matvec(x, gate, slots), ops.expert_matvec(x, up, slots))


class MoE(nn.Module):
    """Router, routed experts and, unless the config has none, shared experts."""

    def __init__(self, args: ModelArgs, layer: LayerSpec):
        super().__init__()
        self.gate = Router(args, layer.experts)
        self.switch_mlp: RoutedExperts = SwitchMLP(
            args.hidden_size, args.moe_intermediate_size, layer.experts
        )
        if args.n_shared_experts:
            width = args.moe_intermediate_size * args.n_shared_experts
            self.shared_experts = MLP(args.hidden_size, width)

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """The half of a layer: x [b, l, hidden] + (routed(h) + shared(h)), with h = norm(x)."""
        if self.gate.takes_block(x) and keeps_dtype(norm, x) and self._shared_is_plain():
            shared = self.shared_experts.weights() if "shared_experts" in self else None
            y = self.switch_mlp.block(self.gate, x, (norm.weight, norm.eps), shared)
            if y is not None:
                return y
        flat = norm(x).reshape(-1, x.shape[-1])
        meanwhile = self.shared_experts.feed_forward if "shared_experts" in self else mx.zeros_like
        routed, other = self.switch_mlp(flat, *self.gate(flat), meanwhile)
        y = routed + other if "shared_experts" in self else routed
        return x + y.reshape(x.shape)

    def is_recordable(self) -> bool:
        """Whether a decode step can be recorded of it: all in memory, no adapters in training."""
        routed = self.switch_mlp
        in_memory = isinstance(routed, SwitchMLP) and None not in routed.weights()
        return in_memory and self._shared_is_plain()

    def _shared_is_plain(self) -> bool:
        return "shared_experts" not in self or self.shared_experts.is_plain()
