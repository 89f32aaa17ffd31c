"""How machines best share a model: by rows of its matrices, or by layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..checkpoint.checked import checked
from ..checkpoint.folder import Checkpoint
from ..formats.kv_rows import FLOATS
from ..memory import size
from ..models.line import Place
from ..models.pipeline import Stage
from ..models.prompt_memory import SHARED_STEP
from .cluster import Link, Machine, needs, plan

ALONE, TENSOR, PIPELINE = "alone", "tensor", "pipeline"


def plan_pipeline(
    checkpoint: Checkpoint, machines: Sequence[Machine], link: Link, context: int, kv_format: str
) -> dict[str, Any]:
    """As `plan`, of machines that have layers each: one reads after the other.

    ``together`` is what as many texts as machines get, whose steps take turns: the slowest machine
    reads all the time, or the link keeps all waiting.

    Raises ValueError for a model that so many machines cannot share, or that does not load.
    """
    args, inventory = checked(checkpoint)
    kv_format = inventory.float_format if kv_format == "auto" else kv_format
    ranks = []
    for rank, machine in enumerate(machines):
        stage = Stage.of(args, inventory.loaded_bytes, Place(rank, len(machines)))
        own = stage.own_args()
        how = inventory, stage.share, context, kv_format, SHARED_STEP
        ranks.append(needs(machine, own, *how))
    count = 2 * (len(machines) - 1)
    nbytes = args.hidden_size * FLOATS[inventory.float_format].size
    messages = 1e3 * count * (link.latency + nbytes / link.rate)
    milliseconds = sum(rank["read_ms"] for rank in ranks) + messages
    between = max(milliseconds / len(machines), *(rank["read_ms"] for rank in ranks))
    return {
        "ranks": ranks,
        "messages": {"count": count, "bytes": count * nbytes, "ms": messages},
        "fits": all(rank["fits"] for rank in ranks),
        "ms_per_token": milliseconds,
        "together": {"texts": len(machines), "tokens_per_second": 1e3 / between},
    }


_PLANS = {TENSOR: plan, PIPELINE: plan_pipeline}


def plan_shards(
    checkpoint: Checkpoint,
    machines: Sequence[Machine],
    link: Link,
    context: int,
    kv_format: str,
    ways: Sequence[str] = (TENSOR, PIPELINE),
) -> dict[str, Any]:
    """The way with which a token takes least time, of those that fit if any does, JSON-ready.

    ``shard`` is that way, and ``reason`` says why; ``plans`` are what `plan` and `plan_pipeline`
    give of all ``ways`` that there are, and ``refused`` why there are no others. A machine by
    itself has the whole model, which is the only way then.

    Raises ValueError where the machines cannot share the model in any of these ways.
    """
    plans, refused = {}, {}
    for shard in ways if len(machines) > 1 else (ALONE,):
        try:
            found = _PLANS.get(shard, plan)(checkpoint, machines, link, context, kv_format)
            plans[shard] = found | {"tokens_per_second": 1e3 / found["ms_per_token"]}
        except ValueError as error:
            refused[shard] = str(error)
    if not plans:
        raise ValueError(next(iter(refused.values())))
    best = min(plans, key=lambda shard: (not plans[shard]["fits"], plans[shard]["ms_per_token"]))
    return {
        "context": context,
        "kv_format": checked(checkpoint)[1].float_format if kv_format == "auto" else kv_format,
        "link": asdict(link),
        "shard": best,
        "reason": _reason(plans, refused, link, machines),
        "plans": plans,
        "refused": refused,
    } | {key: plans[best][key] for key in ("fits", "ms_per_token", "tokens_per_second")}


def _reason(
    plans: dict[str, Any], refused: dict[str, str], link: Link, machines: Sequence[Machine]
) -> str:
    reasons = [
        f"{shard} {found['ms_per_token']:.2f} ms a token at least"
        + ("" if found["fits"] else ", and does not fit")
        for shard, found in plans.items()
    ]
    between = f"a link of {1e6 * link.latency:.0f} µs and {link.rate / 1e9:.2f} GB/s"
    disks = ["experts are read from disks"] if machines[0].disk is not None else []
    return f"{between}: {'; '.join([*reasons, *refused.values(), *disks])}"


def format_plans(found: dict[str, Any]) -> list[str]:
    """What `plan_shards` gave, as lines for a terminal."""
    lines = []
    for shard, of_way in found["plans"].items():
        lines += [] if shard == ALONE else [f"--shard {shard}"]
        lines += _format_plan(of_way, f"{found['context']} tokens cached as {found['kv_format']}")
    compared = len(found["plans"]) + len(found["refused"]) > 1
    return [*lines, f"{found['shard']} is best: {found['reason']}"] if compared else lines


def _format_plan(found: dict[str, Any], cached: str) -> list[str]:
    lines = []
    for number, rank in enumerate(found["ranks"]):
        verdict = "fits" if rank["fits"] else "DOES NOT FIT"
        chunk = rank["chunk"]
        lines.append(
            f"  rank {number}    {size(rank['needed'])} of {size(rank['affordable'])} for models:"
            f" {verdict} (weights {size(rank['weights'])}, cache {size(rank['cache'])},"
            f" {chunk['tokens']} tokens of a prompt {size(chunk['bytes'])});"
            f" a token reads {size(rank['weights_read'])} of weights,"
            f" {size(rank['cache_read'])} of cache: {rank['read_ms']:.1f} ms"
        )
    for name in ("gathers", "messages"):
        if (sent := found.get(name)) is not None and sent["count"]:
            nbytes = size(sent["bytes"])
            lines.append(f"  {name:<8}  {sent['count']} a token, {nbytes}: {sent['ms']:.1f} ms")
    lines.append(
        f"  a token   at least {found['ms_per_token']:.1f} ms, {found['tokens_per_second']:.1f}"
        f" tokens/s at most, with {cached}"
    )
    if (several := found.get("together")) is not None:
        rate = several["tokens_per_second"]
        lines.append(f"  {several['texts']} texts   {rate:.1f} tokens/s at most, of all together")
    return lines
