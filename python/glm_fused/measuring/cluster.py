"""What machines that share a model by rows need, and at best take for a token: a cost model."""

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
from ..models.config import ModelArgs
from ..models.prompt_memory import SHARED_STEP, STEPS, cache_bytes, chunk_bytes
from ..models.shard import cuts_of
from ..models.sharded_indexer import keys_pay


@dataclass(frozen=True)
class Machine:
    """A machine: its memory in bytes, and the bytes a second at which it reads it.

    Where experts are streamed, ``disk`` has those at which it reads them.
    """

    memory: int
    rate: int
    disk: int | None = None


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
    gathers take, around a ring of all. Kernels, launches and waiting make it more. Whether scores
    of the indexer are shared out is what machines with this one's device decide.

    Raises ValueError for a model that so many machines cannot share, or that does not load.
    """
    args, inventory = checked(checkpoint)
    kv_format = inventory.float_format if kv_format == "auto" else kv_format
    count = len(machines)
    cuts = cuts_of(args, inventory.formats, count, inventory.block_rows)

    def share(path: str) -> float:
        cut = cuts.get(path)
        return 1.0 if cut is None else cut.width / cut.bounds[-1]

    how = args, inventory, share, context, kv_format
    step = STEPS[-1] if count == 1 else SHARED_STEP
    ranks = [needs(machine, *how, step, count) for machine in machines]
    gathers = _gathers(args, FLOATS[inventory.float_format].size, count, context, link)
    return {
        "ranks": ranks,
        "gathers": gathers,
        "fits": all(rank["fits"] for rank in ranks),
        "ms_per_token": max(rank["read_ms"] for rank in ranks) + gathers["ms"],
    }


def needs(
    machine: Machine,
    args: ModelArgs,
    inventory: Inventory,
    share: Callable[[str], float],
    context: int,
    kv_format: str,
    step: int,
    together: int = 1,
) -> dict[str, Any]:
    """What a machine needs, and reads for a token, that has such a ``share`` of each module.

    Of streamed experts it has those of a token in memory at least, and at most reads as many.

    Args:
        args: those of its layers.
        context: tokens cached.
        step: tokens of a prompt that it takes at a time.
        together: how many machines join each layer's rows.
    """
    weights = read = from_disk = 0.0
    streamed = machine.disk is not None
    for stored in inventory.stored:
        module = stored.source.module
        loaded = stored.loaded * share(module.path)
        active = loaded * activity(args, module)
        is_streamed = streamed and module.experts > 0
        weights += active if is_streamed else loaded
        read += active
        from_disk += active if is_streamed else 0.0
    cache = cache_bytes(args, context, kv_format)
    float_bytes = FLOATS[inventory.float_format].size
    chunk = chunk_bytes(args, step, context, float_bytes, streamed, ranks=together)
    cached = _cache_read(args, context, kv_format, together)
    needed, affordable = weights + cache + chunk, SHARE * machine.memory
    return asdict(machine) | {
        "weights": round(weights),
        "cache": cache,
        "chunk": {"tokens": min(step, context), "bytes": chunk},
        "needed": round(needed),
        "affordable": round(affordable),
        "fits": needed <= affordable,
        "weights_read": round(read),
        "cache_read": cached,
        "read_ms": 1e3 * ((read + cached) / machine.rate + from_disk / (machine.disk or 1)),
    }


def _cache_read(args: ModelArgs, context: int, kv_format: str, together: int) -> int:
    """What a token reads of the cache: the keys that indexers score, and the latents selected."""
    latents = row_bytes(kv_format, args.kv_lora_rank, args.qk_rope_head_dim)
    selected, scored = min(context, args.index_topk), 0
    if _shares_keys(args, context, together):  # and of those that are chosen, the best
        scored = -(-context // together) + together * args.index_topk
    elif context > args.index_topk:
        scored = context
    keys = scored * row_bytes(kv_format, args.index_head_dim, 0)
    return sum(selected * latents + keys * layer.is_full for layer in args.layers)


def _shares_keys(args: ModelArgs, context: int, together: int) -> bool:
    width = args.index_n_heads * args.index_head_dim
    return together > 1 and keys_pay(1, context, args.index_topk, width, together)


def _gathers(
    args: ModelArgs, float_bytes: int, together: int, context: int, link: Link
) -> dict[str, Any]:
    """How often a token's parts are joined, the bytes of it, and how long it takes."""
    if together == 1:
        return {"count": 0, "bytes": 0, "ms": 0.0}
    values = 2 * args.hidden_size + args.vocab_size  # added up twice around; and the logits
    for layer in args.layers:
        values += _heads(args) + 2 * args.hidden_size + _activations(args, layer.is_sparse)
    count, nbytes = 4 * len(args.layers) + 2, float_bytes * values
    if _shares_keys(args, context, together):
        full = sum(layer.is_full for layer in args.layers)
        count, nbytes = count + full, nbytes + full * 4 * args.index_topk * together
    others = together - 1
    seconds = count * others * link.latency + nbytes * others / together / link.rate
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
