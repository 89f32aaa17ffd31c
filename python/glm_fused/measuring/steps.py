"""Times of stages, layers, tokens and prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from ..models.cache import Span
from ..profiling.stages import Stage, stages
from .subject import KINDS, Subject
from .timing import measured, seconds


def stage_rows(subject: Subject) -> list[dict[str, Any]]:
    """A row for each stage of a decode step at each context.

    A row has ``context``, ``stage``, how many ``layers`` of the subject have it, ``us`` in all of
    them, and ``gb_per_s`` of weights and cached rows.
    """
    rows = []
    for context in subject.size.contexts:
        cache = subject.cache(context + 1)
        found: dict[str, list[Stage]] = defaultdict(list)
        for stage in stages(subject.model, cache, 1):
            found[stage.name].append(stage)
        for name, same in found.items():
            taken = seconds(partial(_build_all, same))
            size = sum(stage.read_bytes + stage.cache_bytes for stage in same)
            row = {"context": context, "stage": name, "layers": len(same)}
            rows.append(row | {"us": 1e6 * taken, "gb_per_s": size / taken / 1e9})
        del cache, found
    return rows


def _build_all(found: Sequence[Stage]) -> list[Any]:
    return [stage.build() for stage in found]


def layer_rows(subject: Subject) -> list[dict[str, Any]]:
    """What `measured` says of one layer of each kind, for one token at the size's context."""
    net, context = subject.model.model, subject.size.context
    cache, rows = subject.cache(context), []
    angles = net._rope.angles(Span(context, 1).positions())
    x = subject.floats(1, 1, subject.args.hidden_size)
    chosen = mx.arange(min(context, subject.args.index_topk), dtype=mx.int32)[None, None]
    mx.eval(x, chosen, angles)
    for kind, layer, entry in zip(KINDS, net.layers, cache, strict=True):

        def build(layer: Any = layer, entry: Any = entry) -> list[mx.array]:
            # The cache grows by a token, as a row that is written again would be in another copy.
            selection = None if "indexer" in layer.self_attn else chosen
            out, _ = layer(x, Span.of([entry], 1), angles, entry, selection)
            return [out, *[one.keys for one in entry.caches]]

        rows.append({"layer": kind, "context": context} | measured(build))
    return rows


def token_row(subject: Subject) -> dict[str, Any]:
    """What `measured` says of a token of the subject, and how long one of GLM-5.2 would take.

    ``of_glm_us`` adds the subject's layers up as often as GLM-5.2 has them, and the rest once.
    """
    cache, token = subject.cache(subject.size.context), mx.array([[1]])
    mx.eval(token)

    def build() -> mx.array:
        return mx.argmax(subject.model(token, cache)[:, -1], axis=-1)

    row = measured(build)
    layers = [layer["us"] for layer in layer_rows(subject)]
    rest = max(row["us"] - sum(layers), 0.0)
    counts = KINDS.values()
    whole = sum(us * count for us, count in zip(layers, counts, strict=True)) + rest
    return {"context": subject.size.context} | row | {"of_glm_us": whole}


def prompt_rows(subject: Subject) -> list[dict[str, Any]]:
    """``seconds`` of prompts through the subject's layers, of which the caches are evaluated."""
    rows = []
    for length in subject.size.prompts:
        tokens = mx.arange(length)[None] % subject.args.vocab_size
        mx.eval(tokens)

        def build(tokens: mx.array = tokens) -> list[Any]:
            cache = subject.model.make_cache()
            subject.model(tokens, cache)
            return [entry.state for entry in cache]

        rows.append({"tokens": length, "seconds": seconds(build, repeats=2)})
    return rows
