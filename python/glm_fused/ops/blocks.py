"""Halves of a layer as single nodes of the graph, for up to `MAX_TOKENS` tokens.

On a CPU a node runs the kernels of the ops that it is made of, in their order, so it gives the bits
of that chain; what it saves is the cost of a node for each op. On Metal a node is a few launches,
each of which does what several ops do, and rounds where they store; its bits are the CPU's. The
reference, prompts and other GPUs run the ops one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from .. import _ext
from ..formats.weights import Weight
from . import attention, routes
from .routes import Kernel, Stream

MAX_TOKENS = 16

Norm = tuple[mx.array, float]  # the weight and eps of a norm
Mlp = tuple[Weight, Weight, Weight]  # gate, up and down


class IndexerArguments(NamedTuple):
    """What `attention_project` takes of a full layer's indexer.

    Attributes:
        wk: [dim, hidden].
        k_norm: the weight and eps of the keys' norm.
        k_norm_bias: [dim].
        wq_b: [heads * dim, q_lora_rank].
        weights_proj: [heads, hidden].
        heads: how many heads it has.
        interleaved: which columns are rotated together, as in `glm_fused.ops.rotate`.
        scores: whether queries and weights are wanted, too.
    """

    wk: Weight
    k_norm: Norm
    k_norm_bias: mx.array
    wq_b: Weight
    weights_proj: Weight
    heads: int
    interleaved: bool
    scores: bool


def takes(x: mx.array, stream: Stream = None) -> bool:
    """Whether the halves of a layer run as blocks for x [b, l, hidden]."""
    return x.shape[0] * x.shape[1] <= MAX_TOKENS and _kernel(stream) in (Kernel.cpu, Kernel.metal)


def takes_on_cpu(x: mx.array, stream: Stream = None) -> bool:
    """Whether `takes`, and the blocks are a CPU's."""
    return takes(x, stream) and _kernel(stream) is Kernel.cpu


def takes_on_metal(x: mx.array, stream: Stream = None) -> bool:
    """Whether `takes`, and the blocks are a Metal GPU's."""
    return takes(x, stream) and _kernel(stream) is Kernel.metal


def takes_experts(x: mx.array, experts: int, top_k: int, stream: Stream = None) -> bool:
    """`takes` for `moe_block` with so many experts, of which each token takes ``top_k``."""
    if not takes(x, stream):
        return False
    if _kernel(stream) is Kernel.cpu:
        return True
    # The shared experts take the place of one more choice.
    sizes = ("router_topk", experts), ("moe_decode", x.shape[0] * x.shape[1], top_k + 1)
    return not any(routes.metal_obstacle(*op) for op in sizes)


def attention_project(
    x: mx.array,
    cos: mx.array,
    sin: mx.array,
    norm: Norm,
    q_a: Weight,
    q_a_norm: Norm,
    q_b: Weight,
    kv_a: Weight,
    kv_a_norm: Norm,
    embed_q: Weight,
    nope_dim: int,
    indexer: IndexerArguments | None = None,
    *,
    stream: Stream = None,
) -> tuple[mx.array, ...]:
    """What attention computes before its caches are updated: norms, projections and rotations.

    Args:
        x: float32, float16 or bfloat16 [b, l, hidden].
        cos: float32 [b or 1, 1, l, rope / 2].
        sin: of the same shape.
        norm: of x.
        q_a: [q_lora_rank, hidden].
        q_a_norm: of what it gives.
        q_b: [heads * (nope + rope), q_lora_rank].
        kv_a: [rank + rope, hidden].
        kv_a_norm: of its first ``rank`` columns.
        embed_q: [heads, rank, nope].
        nope_dim: how many columns of a head are not rotated.
        indexer: a full layer's; None for a shared one.
        stream: where to run; None: the default device.

    Returns:
        Queries [b, l, heads, rank + rope], latents [b, 1, l, rank] and rotated keys
        [b, 1, l, rope]; with an indexer its keys [b, 1, l, dim], and if it scores its queries
        [b, l, heads, dim] and weights float32 [b, l, heads], as yet without their factor.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names an op and its argument.
    """
    shared = (x, cos, sin, norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, embed_q, nope_dim)
    kernel = _kernel(stream)
    if indexer is None:
        return tuple(_ext.attention_project(*shared, kernel, stream))
    return tuple(_ext.full_attention_project(*shared, *indexer, kernel, stream))


def attention_output(
    x: mx.array, attended: mx.array, unembed_out: Weight, o_proj: Weight, *, stream: Stream = None
) -> mx.array:
    """``x + o_proj(unembed_out(attended))``, every step rounded to x's dtype.

    Args:
        x: float32, float16 or bfloat16 [b, l, hidden].
        attended: float32 [b, l, heads, rank], of `glm_fused.ops.sparse_mla_decode`.
        unembed_out: [heads, v, rank].
        o_proj: [hidden, heads * v].
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names an op and its argument.
    """
    return _ext.attention_output(x, attended, unembed_out, o_proj, _kernel(stream), stream)


def attends(latents: mx.array, selected: mx.array | None, stream: Stream = None) -> bool:
    """Whether `attend` is one node."""
    listed = attention.listed_keys(latents, selected)
    return routes.choose("sparse_mla_decode", listed, stream=stream).kernel is Kernel.metal


def attend(
    x: mx.array,
    q: mx.array,
    latents: mx.array,
    ropes: mx.array | None,
    selected: mx.array | None,
    unembed_out: Weight,
    o_proj: Weight,
    *,
    rank: int,
    scale: float,
    start: mx.array | None = None,
    stream: Stream = None,
) -> mx.array:
    """`glm_fused.ops.sparse_mla_decode`, then `attention_output`; on Metal that is one node.

    Args:
        x: float32, float16 or bfloat16 [b, l, hidden].
        q: as `sparse_mla_decode` takes it, and all arguments up to `selected`.
        latents: [b, t, rank] or packed rows.
        ropes: [b, t, rope] or None.
        selected: int32 [b, l, k] or None.
        unembed_out: [heads, v, rank].
        o_proj: [hidden, heads * v].
        rank: as `sparse_mla_decode` takes it.
        scale: as `sparse_mla_decode` takes it.
        start: as `sparse_mla_decode` takes it.
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names an op and its argument.
    """
    if attends(latents, selected, stream):
        return _ext.metal_attend(
            x, q, latents, ropes, selected, unembed_out, o_proj, rank, scale, start, stream
        )
    attended = attention.sparse_mla_decode(
        q, latents, ropes, selected, rank=rank, scale=scale, start=start, stream=stream
    )
    return attention_output(x, attended, unembed_out, o_proj, stream=stream)


def mlp_block(x: mx.array, norm: Norm, weights: Mlp, *, stream: Stream = None) -> mx.array:
    """``x + down(silu(gate(h)) * up(h))`` with ``h = rms_norm(x)``.

    Args:
        x: float32, float16 or bfloat16 [b, l, hidden].
        norm: of x.
        weights: gate and up [intermediate, hidden], down [hidden, intermediate].
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names an op and its argument.
    """
    return _ext.mlp_block(x, norm, weights, _kernel(stream), stream)


def moe_block(
    x: mx.array,
    norm: Norm,
    router: tuple[mx.array, mx.array],
    experts: Mlp,
    shared: Mlp | None,
    *,
    use: _ext.SlotUse | None = None,
    stream: Stream = None,
    **routing: Any,
) -> mx.array:
    """``x + (routed(h) + shared(h))`` with ``h = rms_norm(x)``; the experts that a router chooses.

    With `use`, which Metal alone takes, the evaluation of the node waits for the router's choice
    and until its experts are read, and the GPU computes a part of the shared ones meanwhile.

    Args:
        x: float32, float16 or bfloat16 [b, l, hidden].
        norm: of x.
        router: the weight [experts, hidden] and the correction bias [experts].
        experts: as of `glm_fused.ops.moe_decode`, with a matrix for each expert; with `use` for
            each slot.
        shared: the weights of the experts that every token takes, as of `mlp_block`.
        use: of the bank whose arrays `experts` are.
        stream: where to run; None: the default device.
        routing: keyword arguments of `glm_fused.ops.router_topk`.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names an op and its argument.
    """
    return _ext.moe_block(
        x, norm, *router, **routing, experts=experts, shared=shared, use=use,
        kernel=_kernel(stream), stream=stream,
    )  # fmt: skip


def _kernel(stream: Stream) -> Kernel:
    return routes.choose("rms_norm", stream=stream).kernel
