"""What several machines that share a model need, and at best take for a token: a cost model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.checked import checked
from ..checkpoint.folder import Checkpoint
from ..checkpoint.layer_description import activity
from ..checkpoint.stored import Inventory
from ..formats.kv_rows import FLOATS, row_bytes
from ..generation.planning import SHARE
from ..memory import size
from ..models.config import ModelArgs
from ..models.prompt_memory import STEPS, cache_bytes, chunk_bytes
from ..models.shard import cuts_of


@dataclass(frozen=True)
class Machine:
    """A machine: its memory in bytes, and the bytes a second at which it reads it."""

    memory: int
    rate: int


@dataclass(frozen=True)
class Link:
    """What is between two machines: seconds until a first byte is there, then bytes a second."""

    latency: float
    rate: int


def plan(
    checkpoint: Checkpoint, machines: Sequence[Machine], link: Link, context: int, kv_format: str
) -> dict[str, Any]:
    """What a model needs and takes on machines that share it by rows, JSON-ready.

    A token takes at least as long as the slowest machine reads its rows and the cache, and as the
    gathers take, around a ring of all. Kernels, launches and waiting make it more.

    Raises ValueError for a model that so many machines cannot share, or that does not load.
    """
    args, inventory = checked(checkpoint)
    kv_format = inventory.float_format if kv_format == "auto" else kv_format
    ranks = [
        _rank(args, inventory, machine, len(machines), context, kv_format) for machine in machines
    ]
    gathers = _gathers(args, FLOATS[inventory.float_format].size, len(machines), link)
    milliseconds = max(rank["read_ms"] for rank in ranks) + gathers["ms"]
    return {
        "context": context,
        "kv_format": kv_format,
        "link": asdict(link),
        "ranks": ranks,
        "gathers": gathers,
        "fits": all(rank["fits"] for rank in ranks),
        "ms_per_token": milliseconds,
        "tokens_per_second": 1e3 / milliseconds,
    }


def _rank(
    args: ModelArgs,
    inventory: Inventory,
    machine: Machine,
    ranks: int,
    context: int,
    kv_format: str,
) -> dict[str, Any]:
    cuts = cuts_of(args, inventory.formats, ranks, inventory.block_rows)

    def share(path: str) -> float:
        cut = cuts.get(path)
        return 1.0 if cut is None else cut.width / cut.bounds[-1]

    return needs(args, inventory, machine, share, context, kv_format)


def needs(
    args: ModelArgs,
    inventory: Inventory,
    machine: Machine,
    share: Callable[[str], float],
    context: int,
    kv_format: str,
) -> dict[str, Any]:
    """What a machine needs and reads for a token that has such a ``share`` of each module.

    ``args`` are those of its layers.
    """
    weights = read = 0.0
    for stored in inventory.stored:
        module = stored.source.module
        loaded = stored.loaded * share(module.path)
        weights += loaded
        read += loaded * activity(args, module)
    cache = cache_bytes(args, context, kv_format)
    float_bytes = FLOATS[inventory.float_format].size
    needed = weights + cache + chunk_bytes(args, STEPS[-1], context, float_bytes, streamed=False)
    cached = _cache_read(args, context, kv_format)
    affordable = SHARE * machine.memory
    return asdict(machine) | {
        "weights": round(weights),
        "cache": cache,
        "needed": round(needed),
        "affordable": round(affordable),
        "fits": needed <= affordable,
        "weights_read": round(read),
        "cache_read": cached,
        "read_ms": 1e3 * (read + cached) / machine.rate,
    }


def _cache_read(args: ModelArgs, context: int, kv_format: str) -> int:
    """What a token reads of the cache: all keys of indexers, and the latents that they select."""
    latents = row_bytes(kv_format, args.kv_lora_rank, args.qk_rope_head_dim)
    keys = row_bytes(kv_format, args.index_head_dim, 0)
    selected = min(context, args.index_topk)
    scored = keys * context if context > args.index_topk else 0
    return sum(selected * latents + scored * layer.is_full for layer in args.layers)


def _gathers(args: ModelArgs, float_bytes: int, ranks: int, link: Link) -> dict[str, Any]:
    """How often a token's parts are joined, the bytes of it, and how long it takes."""
    if ranks == 1:
        return {"count": 0, "bytes": 0, "ms": 0.0}
    values = 2 * args.hidden_size + args.vocab_size  # added up twice around; and the logits
    for layer in args.layers:
        values += _heads(args) + 2 * args.hidden_size + _activations(args, layer.is_sparse)
    count, nbytes = 4 * len(args.layers) + 2, float_bytes * values
    others = ranks - 1
    seconds = count * others * link.latency + nbytes * others / ranks / link.rate
    return {"count": count, "bytes": nbytes, "ms": 1e3 * seconds}


def _heads(args: ModelArgs) -> int:
    return args.num_attention_heads * args.v_head_dim


def _activations(args: ModelArgs, is_sparse: bool) -> int:
    choices = args.num_experts_per_tok + (args.n_shared_experts or 0)
    return choices * args.moe_intermediate_size if is_sparse else args.intermediate_size


def gathers_of(checkpoint: Checkpoint) -> dict[str, int]:
    """The bytes that a token's gathers have in a layer of a model with experts, by what they are.

    Raises ValueError for a model that does not load.
    """
    args, inventory = checked(checkpoint)
    values = {
        "heads of attention": _heads(args),
        "outputs": args.hidden_size,
        "activations of experts": _activations(args, is_sparse=True),
    }
    return {name: FLOATS[inventory.float_format].size * count for name, count in values.items()}


def format_plan(found: dict[str, Any]) -> list[str]:
    """What `plan` gave, as lines for a terminal."""
    lines = []
    for number, rank in enumerate(found["ranks"]):
        verdict = "fits" if rank["fits"] else "DOES NOT FIT"
        lines.append(
            f"  rank {number}   {size(rank['needed'])} of {size(rank['affordable'])} for models:"
            f" {verdict} (weights {size(rank['weights'])}, cache {size(rank['cache'])});"
            f" a token reads {size(rank['weights_read'])} of weights,"
            f" {size(rank['cache_read'])} of cache: {rank['read_ms']:.1f} ms"
        )
    gathers = found["gathers"]
    if gathers["count"]:
        lines.append(
            f"  gathers  {gathers['count']} a token, {size(gathers['bytes'])}:"
            f" {gathers['ms']:.1f} ms"
        )
    return [
        *lines,
        f"  a token  at least {found['ms_per_token']:.1f} ms, {found['tokens_per_second']:.1f}"
        f" tokens/s at most, with {found['context']} tokens cached as {found['kv_format']}",
    ]
