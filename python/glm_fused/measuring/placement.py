"""How ranks best share a model: by rows of its matrices, or by layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..checkpoint.checked import checked
from ..checkpoint.folder import Checkpoint
from ..formats.kv_rows import FLOATS
from ..models.line import Place
from ..models.pipeline import Stage
from .cluster import Link, Machine, needs, plan

TENSOR, PIPELINE = "tensor", "pipeline"


class Choice(NamedTuple):
    """How ranks share a model, and why."""

    shard: str
    reason: str


def plan_pipeline(
    checkpoint: Checkpoint, machines: Sequence[Machine], link: Link, context: int, kv_format: str
) -> dict[str, Any]:
    """As `plan`, of machines that have layers each: one reads after the other.

    Raises ValueError for a model that so many machines cannot share, or that does not load.
    """
    args, inventory = checked(checkpoint)
    kv_format = inventory.float_format if kv_format == "auto" else kv_format
    ranks = []
    for rank, machine in enumerate(machines):
        stage = Stage.of(args, inventory.loaded_bytes, Place(rank, len(machines)))
        own = stage.own_args()

        def share(path: str, stage: Stage = stage) -> float:
            return float(stage.has(f"{path}."))

        ranks.append(needs(own, inventory, machine, share, context, kv_format))
    count = 2 * (len(machines) - 1)
    nbytes = args.hidden_size * FLOATS[inventory.float_format].size
    messages = 1e3 * count * (link.latency + nbytes / link.rate)
    return {
        "ranks": ranks,
        "messages": {"count": count, "bytes": count * nbytes, "ms": messages},
        "fits": all(rank["fits"] for rank in ranks),
        "ms_per_token": sum(rank["read_ms"] for rank in ranks) + messages,
    }


def choose(
    checkpoint: Checkpoint, machines: Sequence[Machine], link: Link, context: int, kv_format: str
) -> Choice:
    """The way with which a token takes least time, of those that fit if any does.

    Raises ValueError where the machines cannot share the model in either way.
    """
    how = checkpoint, machines, link, context, kv_format
    plans, refused = {}, {}
    for shard, planned in ((TENSOR, plan), (PIPELINE, plan_pipeline)):
        try:
            plans[shard] = planned(*how)
        except ValueError as error:
            refused[shard] = error
    if not plans:
        raise refused[TENSOR]
    best = min(plans, key=lambda shard: (not plans[shard]["fits"], plans[shard]["ms_per_token"]))
    reasons = [
        f"{shard} {found['ms_per_token']:.2f} ms a token at least"
        + ("" if found["fits"] else ", and does not fit")
        for shard, found in plans.items()
    ]
    reasons += [str(error) for error in refused.values()]
    return Choice(best, f"{_link(link)}: {'; '.join(reasons)}")


def _link(link: Link) -> str:
    return f"a link of {1e6 * link.latency:.0f} µs and {link.rate / 1e9:.2f} GB/s"
