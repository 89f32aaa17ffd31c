"""Times a decode step and a chunk of a prompt, whole and stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from ..engine import Engine
from ..generation.planning import plan_prompt
from ..selftest.benchmark import read_bandwidth
from .stages import ORDER, Stage, stages

YARDSTICK_BYTES, YARDSTICKS = 512 << 20, 3  # read so often before and after each forward
SECONDS = 10.0  # repeats of a forward end once they have taken so long

OnStep = Callable[[str], None]


def profile(
    engine: Engine,
    prompt_tokens: int,
    repeats: int,
    step: OnStep = lambda what: None,
    drafts: int = 0,
) -> dict[str, Any]:
    """Measure an engine's model, on random tokens; the result is JSON-ready.

    Args:
        engine: what holds the model.
        prompt_tokens: how many come before the decode step, at least 1. The last prefill step of
            them, or all, are the chunk that is measured.
        repeats: how often each time is taken, at most, for the medians.
        step: gets what is done next.
        drafts: measure a step with so many drafts, too.

    Returns:
        ``prompt``, of which only the caches are kept, ``decode``, and with drafts ``verify``, a
        step of them and one token; each with its number of ``tokens`` and of those ``cached``
        before them; in seconds ``whole_seconds``, of these ``graph_seconds`` in which Python builds
        the graph, and ``other_seconds`` that are neither that nor a stage's (dispatch, cache
        updates, choosing a token, a prompt's last layer; below 0 where stages take longer alone);
        ``read_gb_per_s``, the plain streaming read bandwidth; and ``stages``, a row for each that
        the forward has: ``stage``, ``layers`` that have it, ``seconds`` in all of them, ``share``
        of the whole, ``weight_bytes`` held, ``read_bytes`` of weights and ``cache_bytes`` of cached
        rows that the forward reads, at least once, ``gb_per_s`` of both, and ``fraction`` of that
        bandwidth.

    Raises:
        ValueError: the model has no room for so many tokens.
    """
    steps = 1 + (drafts and 1 + drafts)
    if prompt_tokens + steps > engine.context:
        raise ValueError(
            f"[profile] {prompt_tokens} tokens before a step, expected at most"
            f" {engine.context - steps}, as there is room for {engine.context}."
        )
    shape = (1, prompt_tokens + steps)
    tokens = mx.random.randint(0, engine.model.args.vocab_size, shape, mx.int32)
    yardstick = mx.zeros((YARDSTICK_BYTES // 4,), mx.uint32)
    mx.eval(tokens, yardstick)
    meter = _Meter(engine, yardstick, repeats)
    step("prompt")
    chunk = plan_prompt(engine.model, prompt_tokens + 1).prefill_step_size
    measured = prompt_tokens - min(prompt_tokens, chunk)
    for start in range(0, measured, chunk):
        meter.run(tokens[:, start : min(start + chunk, measured)], decode=False)
    prompt = meter.measure(tokens[:, measured:prompt_tokens], decode=False)
    step("decode")
    ends = prompt_tokens, prompt_tokens + 1
    found = {"prompt": prompt, "decode": meter.measure(tokens[:, slice(*ends)], decode=True)}
    if drafts:
        step("verify")
        found["verify"] = meter.measure(tokens[:, ends[1] :], decode=True)
    return found


class _Meter:
    """Measures forwards, one after the other; each stays in the cache once it is measured."""

    def __init__(self, engine: Engine, yardstick: mx.array, repeats: int):
        self.engine, self.yardstick, self.repeats = engine, yardstick, repeats
        self.cache = engine.make_cache()

    def run(self, tokens: mx.array, decode: bool) -> tuple[float, float]:
        """The seconds of a forward as generation runs it, and of building its graph.

        To decode is to evaluate the likeliest token; of a prompt only the caches are evaluated.
        """
        start = time.perf_counter()
        logits = self.engine.step(tokens, self.cache)
        wanted = [mx.argmax(logits[:, -1], axis=-1)] if decode else [c.state for c in self.cache]
        built = time.perf_counter()
        mx.eval(wanted)
        return time.perf_counter() - start, built - start

    def measure(self, tokens: mx.array, decode: bool) -> dict[str, Any]:
        """What `profile` says of a forward of tokens [1, n]."""
        length, cached = tokens.shape[1], self.cache[0][0].size()
        self.run(tokens, decode)
        found = stages(self.engine.model, self.cache, length, decode)
        trim_prompt_cache(self.cache, length)
        bandwidths = [read_bandwidth(self.yardstick) for _ in range(YARDSTICKS)]
        wholes, parts = self._samples(found, tokens, decode)
        bandwidths += [read_bandwidth(self.yardstick) for _ in range(YARDSTICKS)]
        self.run(tokens, decode)
        whole, graph = (median(times) for times in zip(*wholes, strict=True))
        bandwidth = median(bandwidths)
        rows = [_row(found, parts, name, whole, bandwidth) for name in ORDER if name in parts[0]]
        return {
            "tokens": length,
            "cached": cached,
            "whole_seconds": whole,
            "graph_seconds": graph,
            "other_seconds": whole - graph - sum(row["seconds"] for row in rows),
            "read_gb_per_s": bandwidth,
            "stages": rows,
        }

    def _samples(
        self, found: Sequence[Stage], tokens: mx.array, decode: bool
    ) -> tuple[list[tuple[float, float]], list[dict[str, float]]]:
        """What `run` gives of tokens and `_stage_seconds` of their stages, time and again."""
        wholes, parts = [], []
        deadline = time.perf_counter() + SECONDS
        for turn in range(self.repeats + decode):
            whole = self.run(tokens, decode)
            trim_prompt_cache(self.cache, tokens.shape[1])
            part = _stage_seconds(found, together=decode)
            if decode and turn == 0:  # the yardstick has taken the caches
                continue
            wholes.append(whole)
            parts.append(part)
            if time.perf_counter() > deadline:
                break
        return wholes, parts


def _stage_seconds(found: Sequence[Stage], together: bool) -> dict[str, float]:
    """The seconds in which the stages of each name are evaluated, in all layers.

    ``together`` evaluates the stages of a name at once, as in the model's own graph, so that the
    start of an evaluation does not count; it holds the results of all layers at a time.
    """
    seconds = dict.fromkeys((stage.name for stage in found), 0.0)
    for name in seconds:
        graphs = [stage.build for stage in found if stage.name == name]
        for group in [graphs] if together else [[graph] for graph in graphs]:
            outputs = [build() for build in group]
            start = time.perf_counter()
            mx.eval(outputs)
            seconds[name] += time.perf_counter() - start
    return seconds


def _row(
    found: Sequence[Stage],
    parts: Sequence[dict[str, float]],
    name: str,
    whole: float,
    bandwidth: float,
) -> dict[str, Any]:
    same = [stage for stage in found if stage.name == name]
    seconds = median(part[name] for part in parts)
    weights, rows = sum(s.read_bytes for s in same), sum(s.cache_bytes for s in same)
    rate = (weights + rows) / seconds / 1e9
    return {
        "stage": name,
        "layers": len(same),
        "seconds": seconds,
        "share": seconds / whole,
        "weight_bytes": sum(s.held_bytes for s in same),
        "read_bytes": round(weights),
        "cache_bytes": rows,
        "gb_per_s": rate,
        "fraction": rate / bandwidth,
    }
