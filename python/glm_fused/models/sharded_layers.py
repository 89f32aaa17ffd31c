"""Layers of which a rank has a part of the rows; what they give is whole.

See `glm_fused.models.shard` for which these are.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .layers import (
    Embedding,
    Joined,
    Linear,
    MultiLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiLinear,
    RMSNorm,
)
from .moe import MoE
from .ranks import Cut, Ranks


class Joint(NamedTuple):
    """How the parts of a layer are joined.

    Attributes:
        cut: of the output along ``axis``, or of an embedding's rows.
        axis: of the output.
        inputs: of the last axis of an input of which ranks have parts; None where it is whole.
        of_prompts: whether nothing waits for the layer's output for a prompt: logits are seldom
            evaluated for each of its tokens.
    """

    cut: Cut
    axis: int = -1
    inputs: Cut | None = None
    of_prompts: bool = True


class _Gathered(Joined, nn.Module):
    """A layer of linear maps that joins what all ranks give of its rows, or of its matrices."""

    _ranks: Ranks
    _joint: Joint

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., in], which may have to be joined first, to [..., out]."""
        cut, axis, inputs, of_prompts = self._joint
        if inputs is not None:
            x = self._ranks.gather(x, inputs)
        is_awaited = of_prompts or x.size // x.shape[-1] <= ops.blocks.MAX_TOKENS
        return self._ranks.gather(super().__call__(x), cut, axis, is_awaited)


class GatheredLinear(_Gathered, Linear):  # type: ignore[misc]
    """A part of a `Linear`."""


class GatheredQuantizedLinear(_Gathered, QuantizedLinear):  # type: ignore[misc]
    """A part of a `QuantizedLinear`."""


class GatheredMultiLinear(_Gathered, MultiLinear):  # type: ignore[misc]
    """Some heads of a `MultiLinear`."""


class GatheredQuantizedMultiLinear(_Gathered, QuantizedMultiLinear):  # type: ignore[misc]
    """Some heads of a `QuantizedMultiLinear`."""


class _Ranked(nn.Module):
    """An embedding of which each rank has the rows of some tokens."""

    _ranks: Ranks
    _joint: Joint

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens [...] -> their rows [..., dims]."""
        cut, rank = self._joint.cut, self._ranks.rank
        tokens = tokens.astype(mx.int32)
        here = (tokens >= cut.bounds[rank]) & (tokens < cut.bounds[rank + 1])
        local = (tokens - cut.part(rank).start) % cut.width  # of others any row that is there
        return self._ranks.pick(super().__call__(local), here)


class RankedEmbedding(_Ranked, Embedding):  # type: ignore[misc]
    """A part of an `Embedding`."""


class RankedQuantizedEmbedding(_Ranked, QuantizedEmbedding):  # type: ignore[misc]
    """A part of a `QuantizedEmbedding`."""


_SHARDED: dict[type[nn.Module], type[nn.Module]] = {
    Linear: GatheredLinear,
    QuantizedLinear: GatheredQuantizedLinear,
    MultiLinear: GatheredMultiLinear,
    QuantizedMultiLinear: GatheredQuantizedMultiLinear,
    Embedding: RankedEmbedding,
    QuantizedEmbedding: RankedQuantizedEmbedding,
}


def gathered(layer: nn.Module, ranks: Ranks, joint: Joint) -> nn.Module:
    """The layer of which ``layer`` is a part; what it gives is whole."""
    sharded = as_kind(_SHARDED[type(layer)], layer)
    sharded._ranks = ranks
    object.__setattr__(sharded, "_joint", joint)  # nn.Module would look for arrays in a tuple
    return sharded


def as_kind(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """A module of another class with the same parts."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    dict.update(made, module)  # nn.Module.update takes known parameters only
    return made


class ShardedMoE(MoE):
    """Router, and parts of the experts' rows: what it gives is whole."""

    _ranks: Ranks
    _cuts: tuple[list[Cut], Cut]

    @staticmethod
    def of(moe: MoE, ranks: Ranks, inner: list[Cut], outer: Cut) -> ShardedMoE:
        """The layer of which ``moe`` is a part.

        ``inner`` are the cuts of gate's and up's rows, of routed and of shared experts if there
        are any, and ``outer`` that of down's.
        """
        made = as_kind(ShardedMoE, moe)
        assert isinstance(made, ShardedMoE)
        made._ranks = ranks
        object.__setattr__(made, "_cuts", (inner, outer))
        return made

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """As `MoE`."""
        inner, outer = self._cuts
        flat = norm(x).reshape(-1, x.shape[-1])
        experts, scores = self.gate(flat)
        shared = self.shared_experts if "shared_experts" in self else None

        def beside(x: mx.array) -> list[mx.array]:
            return [] if shared is None else [ops.swiglu(shared.gate_proj(x), shared.up_proj(x))]

        def join(parts: list[mx.array]) -> list[mx.array]:
            return self._ranks.gather_together(parts, inner[: len(parts)])

        y, other = self.switch_mlp.part(flat, experts, scores, beside, join)
        if shared is not None:
            y = y + shared.down_proj(*other)
        return x + self._ranks.gather(y, outer).reshape(x.shape)
