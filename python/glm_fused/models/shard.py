"""Tensor parallel: what each of several ranks has of a model, so that together they give its bits.

Ranks are processes of one `mx.distributed` group. Each has whole rows of the matrices that
`glm_fused.models.tensors` lets them split, computes whole dot products, and gathers what the others
computed. No sum is cut or reordered, so any number of ranks gives the bits of one.

What a rank has by itself, and computes as all others do: norms, the projections to latents
(``q_a_proj``, ``kv_a_proj_with_mqa``), the indexer, the router, and all caches. Only the indexer's
scores may be shared out, as below. A token's layer gathers four times:

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
one have zeros, as integers) and gathers its logits, and where there are drafts begins with 48 bytes
of each rank, which say what it is about to do (`glm_fused.generation.lockstep`). A gather costs the
link's latency and ``(n - 1) / n`` of those bytes: 78 layers x 4 are 312 gathers a token, 3 ms at
10 µs each, 62 ms at 200 µs, and 7.2 MB, at n = 2 3.6 MB a rank: 0.7 ms at 5 GB/s. So a link of
200 µs costs more than two ranks gain (half of some 45 ms); one of 10 µs costs a seventh of it.

On a CPU a decode step, gathers and all, is one recorded node (`glm_fused.models.decode_step`),
unless experts are streamed or ranks share out the indexer's scores.

The indexer's scores (`glm_fused.models.sharded_indexer`) are shared out where this spares a rank
more multiply-adds than it could do while it gathers what the others chose, one gather a full layer:

=========  ===========================  =======================  ==============================
new        a rank scores                gathered a token         GLM-5.2 with two ranks, from
tokens                                                           how many cached keys on
=========  ===========================  =======================  ==============================
several    its share of them, against   ``top_k`` x 4 bytes,     CPU: as soon as keys are left
           all keys                     of all ranks together    out; GPU: 8,400 of 512 tokens
one        it against its share of the  as much of each rank     CPU: 10,800; GPU: 155,000
           keys, then what all chose
=========  ===========================  =======================  ==============================

A CPU is taken to do 50 billion of them a second and to gather in 100 µs at 1 GB/s, a GPU 10,000
billion, 30 µs and 5 GB/s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..formats.weights import FORMATS, Format
from .config import ModelArgs
from .decoder import Model
from .layers import MLP
from .ranks import Cut, Ranks
from .sharded_indexer import ShardedIndexer
from .sharded_layers import Joint, ShardedMoE, gathered
from .tensors import Module, modules

TILE = 8  # rows; a matrix of whole tiles has another order of sums than others (csrc/formats)


@dataclass(frozen=True)
class Sharding:
    """This rank's part of a model.

    Attributes:
        ranks: those that share the model; all have to make the same calls of it, as each waits for
            the others.
        cuts: how they share each module that they split, by its path.
    """

    ranks: Ranks
    cuts: Mapping[str, Cut]

    @classmethod
    def of(
        cls, args: ModelArgs, formats: Mapping[str, Format], ranks: Ranks, block: int = 1
    ) -> Sharding:
        """How ``ranks`` share a model; arguments and errors are those of `cuts_of`."""
        return cls(ranks, cuts_of(args, formats, ranks.size, block))

    def parts(self) -> dict[str, slice]:
        """What the rank has, along the shard axis, of each module that is split."""
        return {path: cut.part(self.ranks.rank) for path, cut in self.cuts.items()}

    def has(self, name: str) -> bool:
        """Whether the rank needs a tensor of the model: it has some of each, or all."""
        return True

    def share(self, path: str) -> float:
        """Which share of a module's weight the rank has."""
        cut = self.cuts.get(path)
        return 1.0 if cut is None else cut.width / cut.bounds[-1]

    def local_args(self, args: ModelArgs) -> ModelArgs:
        """Args whose heads and experts are as many and as wide as the rank's."""
        local = copy.copy(args)
        for path, cut in self.cuts.items():
            if path.endswith(".embed_q"):
                local.num_attention_heads = cut.width
            elif path.endswith(".switch_mlp.gate_proj"):
                local.moe_intermediate_size = cut.width
        return local

    def keep(self, model: Model) -> None:
        """Leave in a model that has no weights yet the shapes of the rank's parts."""
        layers, parts = dict(model.named_modules()), self.parts()
        for module in modules(model.args):
            if module.path in parts and module.path in layers:  # streamed experts have no layers
                _keep(layers[module.path], module, parts[module.path])

    def join(self, model: Model) -> None:
        """Have the layers of a model with the rank's parts give what is whole."""
        model.ranks = self.ranks
        _join(model, self.ranks, self.cuts)


def cuts_of(
    args: ModelArgs, formats: Mapping[str, Format], ranks: int, block: int = 1
) -> dict[str, Cut]:
    """How so many ranks share the modules that they split, by their paths.

    ``formats`` are those of packed modules. No part cuts through a ``block`` of rows, which share
    what they are stored with.

    Raises ValueError, naming the module, for one that cannot be split among so many ranks.
    """
    unit = math.lcm(row_unit(formats.values()), block)
    per_head = math.gcd(args.qk_head_dim, args.qk_nope_head_dim + args.v_head_dim)
    heads = block // math.gcd(block, per_head)
    table = [module for module in modules(args) if module.shard is not None]
    dense = FORMATS["bf16"]
    return {m.path: cut_of(m, formats.get(m.path, dense), unit, heads, ranks) for m in table}


def row_unit(formats: Iterable[Format]) -> int:
    """How many rows of a model's matrices stay together: whole tiles, and whole blocks of FP8."""
    return math.lcm(TILE, *(plane.rows for fmt in formats for plane in fmt.planes))


def cut_of(module: Module, fmt: Format, unit: int, heads: int, ranks: int) -> Cut:
    """How ranks share a module.

    Of its rows ``unit`` stay together, if those are whole units, or the rows of ``heads`` heads.

    Raises ValueError, naming the module, where a rank would have nothing, or dot products with
    another order of sums.
    """
    assert module.shard is not None
    count = module.shape[module.shard]
    if module.together is not None:
        together = module.together * heads
    else:
        together = unit if count % unit == 0 else 1
    if count % together or count // together < ranks:
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
    """Leave in a dense layer some of its rows, or of its matrices."""
    layer.weight = layer.weight[:, part] if module.shard == 1 else layer.weight[part]
    if "bias" in layer:
        layer.bias = layer.bias[part]


def _join(model: Model, ranks: Ranks, cuts: Mapping[str, Cut]) -> None:
    """Have the model's layers give what is whole; ``cuts`` are those of its modules."""
    joined: list[tuple[str, Any]] = []

    def join(path: str, layer: nn.Module, **how: Any) -> None:
        joined.append((path, gathered(layer, ranks, Joint(cuts[path], **how))))

    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}"
        attention, mlp = layer.self_attn, layer.mlp
        if "indexer" in attention:
            path = f"{prefix}.self_attn.indexer"
            joined.append((path, ShardedIndexer.of(attention.indexer, ranks)))
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
