"""How long ranks wait for one another in a decode step."""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from ..models.decoder import Model
from ..models.ranks import Ranks

CACHED, STEPS = 32, 9


def measure_gathers(model: Model, ranks: Ranks) -> dict[str, Any]:
    """What gathers cost in a decode step after a short text; all ``ranks`` have to call it.

    The time in gathers is what a step takes longer than one in which each rank's own parts stand
    for those of all others: sending and receiving, and waiting for ranks that are later. Both are
    evaluated one at a time, so ``step_seconds`` is more than a token takes within a text.

    Returns the number of ``gathers`` in a step, the ``bytes`` that each rank then has of them, and
    this rank's medians ``seconds`` in gathers and ``step_seconds``.
    """
    cache, tokens = model.make_cache(), mx.arange(CACHED + 1)[None] % model.args.vocab_size
    mx.eval(model(tokens[:, :-1], cache))
    wholes, alones = [], []
    for turn in range(STEPS + 1):
        before = ranks.traffic
        whole = _step(model, ranks, tokens[:, -1:], cache)
        gathers, nbytes = ranks.traffic - before
        alone = _step(model, ranks, tokens[:, -1:], cache, is_alone=True)
        if turn:  # the first warms up
            wholes.append(whole)
            alones.append(alone)
    seconds = median([whole - alone for whole, alone in zip(wholes, alones, strict=True)])
    return {
        "gathers": gathers,
        "bytes": nbytes,
        "seconds": seconds,
        "step_seconds": median(wholes),
    }


def _step(
    model: Model, ranks: Ranks, token: mx.array, cache: list[Any], is_alone: bool = False
) -> float:
    """The seconds of a step, which the cache then forgets."""
    ranks.meet()
    start = time.perf_counter()
    with ranks.alone() if is_alone else nullcontext():
        mx.eval(model(token, cache))
    seconds = time.perf_counter() - start
    trim_prompt_cache(cache, 1)
    return seconds
