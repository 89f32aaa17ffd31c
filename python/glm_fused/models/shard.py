"""Tensor parallel: what each of several ranks has of a model, so that together they give its bits.

Ranks are processes of one `mx.distributed` group. Each has whole rows of the matrices that
`glm_fused.models.tensors` lets them split, computes whole dot products, and gathers what the others
computed. No sum is cut or reordered, so any number of ranks gives the bits of one.

What a rank has by itself, and computes as all others do: norms, the projections to latents
(``q_a_proj``, ``kv_a_proj_with_mqa``), the indexer, the router, and all caches. A token's layer
gathers four times:

==========================  ======================================  =================  =========
gathered                    by                                      values a token     GLM-5.2
==========================  ======================================  =================  =========
heads of attention          ``unembed_out``                         heads x v_head     32 KiB
output of attention         rows of ``o_proj``                      hidden             12 KiB
activations of the MLP      rows of gate and up, routed and shared  (top_k + shared)   36 KiB
                                                                    x intermediate
output of the MLP           rows of down, weighted and added        hidden             12 KiB
==========================  ======================================  =================  =========

The last column is in bfloat16. Besides, a step adds up the embedding's rows (of which all ranks but
one have zeros, as integers) and gathers its logits. A gather costs the link's latency and
``(n - 1) / n`` of those bytes: 78 layers x 4 are 312 gathers a token, 3 ms at 10 µs each, 62 ms at
200 µs, and 7.2 MB, at n = 2 3.6 MB a rank: 0.7 ms at 5 GB/s. So a link of 200 µs costs more than
two ranks gain (half of some 45 ms); one of 10 µs costs a seventh of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..formats.weights import Format, plane_names
from .decoder import Model
from .layers import MLP
from .ranks import Cut, Ranks
from .sharded_layers import Joint, ShardedMoE, gathered
from .tensors import Module, modules

TILE = 8  # rows; a matrix of whole tiles has another order of sums than others (csrc/formats)


def shard(model: Model, ranks: Ranks) -> None:
    """Leave in ``model`` this rank's part of each weight, and have its layers gather.

    The weights may be lazy: then only the part's rows stay in memory once they are read. All ranks
    have to make the same calls of the model from now on, as each waits for the others.

    Raises ValueError, naming the module, for weights that cannot be split among so many ranks.
    """
    table = [module for module in modules(model.args) if module.shard is not None]
    layers = dict(model.named_modules())
    formats = {module.path: layers[module.path].as_weight().format for module in table}
    unit = row_unit(formats.values())
    cuts = {m.path: cut_of(m, formats[m.path], unit, ranks.size) for m in table}
    for module in table:
        _keep(layers[module.path], module, cuts[module.path].part(ranks.rank))
    _join(model, ranks, cuts)


def row_unit(formats: Iterable[Format]) -> int:
    """How many rows of a model's matrices stay together: whole tiles, and whole blocks of FP8."""
    return math.lcm(TILE, *(plane.rows for fmt in formats for plane in fmt.planes))


def cut_of(module: Module, fmt: Format, unit: int, ranks: int) -> Cut:
    """How ranks share a module, of which ``unit`` rows stay together if those are whole units.

    Raises ValueError, naming the module, where a rank would have nothing, or dot products with
    another order of sums.
    """
    assert module.shard is not None
    count = module.shape[module.shard]
    together = module.together or (unit if count % unit == 0 else 1)
    if count // together < ranks:
        what = f"{count} rows of which {together} stay together"
        raise ValueError(f"[shard] {module.path} has {what}: not enough for {ranks} ranks.")
    cut = Cut.of(count, ranks, together)
    if _splits_rows(module):
        _check_rows(module, fmt, cut)
    return cut


def _splits_rows(module: Module) -> bool:
    """Whether ranks have rows of its matrices, and not some of several matrices."""
    return module.shard == len(module.shape) - 2


def _check_rows(module: Module, fmt: Format, cut: Cut) -> None:
    """Refuse parts of packed rows that would have other bits, or cut through blocks."""
    *_, rows, columns = module.shape
    firsts = [cut.part(rank).start for rank in range(len(cut.bounds) - 1)]
    unit = math.lcm(*(plane.rows for plane in fmt.planes))
    has_two_orders = fmt.mode != "dense" and columns % 512 == 0
    other_order = has_two_orders and (cut.width % TILE == 0) != (rows % TILE == 0)
    if other_order or any(number % unit for number in (cut.width, *firsts)):
        of_blocks = f", or of whole blocks of {unit}" if unit > 1 else ""
        raise ValueError(
            f"[shard] {module.path} has {rows} rows, in parts of {cut.width} that begin at"
            f" {', '.join(map(str, firsts))}: expected parts of whole tiles of {TILE} if all rows"
            f" are{of_blocks}, for the same bits."
        )


def _keep(layer: nn.Module, module: Module, part: slice) -> None:
    """Leave in a layer some of its rows, or of its matrices."""
    fmt = layer.as_weight().format
    for plane, name in zip(fmt.planes, plane_names(fmt), strict=True):
        if not _splits_rows(module):
            setattr(layer, name, mx.contiguous(layer[name][part]))
        elif not plane.per_matrix:
            here = slice(part.start // plane.rows, part.stop // plane.rows)
            setattr(layer, name, mx.contiguous(layer[name][..., here, :]))
    if "bias" in layer:
        layer.bias = mx.contiguous(layer.bias[part])


def _join(model: Model, ranks: Ranks, cuts: Mapping[str, Cut]) -> None:
    """Have the model's layers give what is whole; ``cuts`` are those of its modules."""
    joined: list[tuple[str, Any]] = []

    def join(path: str, layer: nn.Module, **how: Any) -> None:
        joined.append((path, gathered(layer, ranks, Joint(cuts[path], **how))))

    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}"
        attention, mlp = layer.self_attn, layer.mlp
        attention.heads = cuts[f"{prefix}.self_attn.embed_q"].width
        join(f"{prefix}.self_attn.unembed_out", attention.unembed_out, axis=-3)
        join(f"{prefix}.self_attn.o_proj", attention.o_proj)
        if "eh_proj" in layer:
            join(f"{prefix}.eh_proj", layer.eh_proj)
        if isinstance(mlp, MLP):
            inputs = cuts[f"{prefix}.mlp.gate_proj"]
            join(f"{prefix}.mlp.down_proj", mlp.down_proj, inputs=inputs)
            continue
        routed, shared = f"{prefix}.mlp.switch_mlp", f"{prefix}.mlp.shared_experts"
        names = [f"{name}.gate_proj" for name in (routed, shared)]
        inner, outer = [cuts[name] for name in names if name in cuts], cuts[f"{routed}.down_proj"]
        joined.append((f"{prefix}.mlp", ShardedMoE.of(mlp, ranks, inner, outer)))
    if "lm_head" in model:
        join("lm_head", model.lm_head, of_prompts=False)
        join("model.embed_tokens", model.model.embed_tokens)
    model.update_modules(tree_unflatten(joined))
