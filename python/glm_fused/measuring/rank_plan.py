"""What each of the ranks that share a model holds of it, and of how much memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlx.utils import tree_flatten

from ..generation.planning import SHARE, plan_prompt
from ..memory import machine_bytes, size
from ..models.decoder import Model
from ..models.line import Line
from ..models.ranks import Ranks
from ..models.tensors import modules
from ..parallel.agreement import tell
from ..streaming.model import streaming_of

KINDS = 4  # of weights that a line names; the others are one


def plans_of_ranks(model: Model, ranks: Ranks | Line, context: int) -> list[dict[str, Any]]:
    """What each rank holds for texts of so many tokens, in their order; all have to call it."""
    found = tell(ranks.group, json.dumps(rank_plan(model, context)))
    return [{"rank": rank} | json.loads(text) for rank, text in enumerate(found)]


def rank_plan(model: Model, context: int) -> dict[str, Any]:
    """What this process holds for texts of so many tokens, in bytes, JSON-ready.

    ``weights`` are those of each kind of module, largest first, and ``slots`` those for streamed
    experts. ``total`` is all of it; where experts are streamed it is what was planned, with the
    program itself, which the budget has to have room for.
    """
    streaming, plan = streaming_of(model), plan_prompt(model, context)
    found = {
        "weights": dict(_weights(model).most_common()),
        "slots": 0,
        "cache": plan.cache,
        "temporaries": plan.temporaries,
        "context": context,
        "total": plan.total,
        "budget": int(machine_bytes() * SHARE),
    }
    if streaming is None:
        return found
    shares = streaming.plan.shares
    return found | {
        "slots": streaming.plan.slot_bytes,
        "cache": shares.kv,
        "temporaries": shares.staging,
        "context": streaming.plan.context,
        "total": streaming.plan.total,
        "budget": streaming.plan.budget,
    }


def _weights(model: Model) -> Counter[str]:
    kinds = {module.path: module.kind for module in modules(model.args)}
    found: Counter[str] = Counter()
    for name, array in dict(tree_flatten(model.parameters(), destination={})).items():
        found[kinds[name.rpartition(".")[0]]] += array.nbytes
    return found


def format_ranks(plans: Sequence[dict[str, Any]]) -> str:
    """What `plans_of_ranks` gave, a line for each."""
    return "\n".join(_line(plan) for plan in plans)


def _line(plan: dict[str, Any]) -> str:
    weights = list(plan["weights"].items())
    rest = sum(nbytes for _, nbytes in weights[KINDS:])
    parts = [f"{kind} {size(nbytes)}" for kind, nbytes in weights[:KINDS]]
    parts += [f"other weights {size(rest)}"] if rest else []
    parts += [f"slots for experts {size(plan['slots'])}"] if plan["slots"] else []
    parts += [
        f"cache of {plan['context']:,} tokens {size(plan['cache'])}",
        f"temporaries {size(plan['temporaries'])}",
    ]
    held, room = size(plan["total"]), size(plan["budget"])
    return f"rank {plan['rank']}  {held} of {room}: {', '.join(parts)}"
