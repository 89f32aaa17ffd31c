"""Compares the fused path with the reference, in bits and in speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit

from ..generation.decoding import Decoding, Drafting, settled
from ..generation.drafts.options import DraftOptions
from ..generation.generate import OnProgress, debug_paths, ratio
from ..generation.options import Options
from ..generation.planning import plan_prompt
from ..generation.prompts import room
from ..models.decoder import Model
from ..ops import paths

# With fewer tokens a speed tells what the start costs, and little of what a token costs.
MEANINGFUL_TOKENS = 16
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


@dataclass(frozen=True)
class Run:
    """What one path computed: the tokens, and the logits [vocab] that each was chosen from.

    With drafts, several tokens come at once.
    """

    prompt_tokens: int
    tokens: list[int]
    logits: list[mx.array]
    prefill_seconds: float
    step_seconds: list[float]
    drafts: bool

    @property
    def prefill_tps(self) -> float | None:
        """Tokens per second; None where the prompt is too short for it to mean anything."""
        if self.prompt_tokens < MEANINGFUL_TOKENS:
            return None
        return ratio(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tps(self) -> float | None:
        """Tokens per second of the median step; None where there is only the first token.

        With drafts it is that of all steps together.
        """
        if not self.step_seconds:
            return None
        average = statistics.mean if self.drafts else statistics.median
        return ratio(1, average(self.step_seconds))


@dataclass(frozen=True)
class Comparison:
    """The fused and the reference run of one prompt."""

    fused: Run
    reference: Run
    first_difference: dict[str, Any] | None

    @property
    def bit_identical(self) -> bool:
        """Whether tokens and logits of all steps have the same bits."""
        return self.first_difference is None

    def describe(self) -> dict[str, Any]:
        """The comparison, JSON-ready; ``tps`` is tokens a second."""
        fused, reference = self.fused, self.reference
        return {
            "bit_identical": self.bit_identical,
            "first_difference": self.first_difference,
            "prompt_tokens": fused.prompt_tokens,
            "steps": len(fused.tokens),
            "logits_per_step": fused.logits[0].size,
            "tokens": fused.tokens,
            "fused": {"prefill_tps": fused.prefill_tps, "decode_tps": fused.decode_tps},
            "reference": {"prefill_tps": reference.prefill_tps, "decode_tps": reference.decode_tps},
            "speedup": {
                "prefill": ratio(fused.prefill_tps, reference.prefill_tps),
                "decode": ratio(fused.decode_tps, reference.decode_tps),
            },
        }


def compare(
    model: Model,
    prompt: Sequence[int],
    options: Options,
    on_progress: OnProgress = lambda what, done, total: None,
    drafts: DraftOptions | None = None,
) -> Comparison:
    """Run both paths from fresh caches for ``max_tokens`` steps; nothing ends them earlier.

    The fused one makes ``drafts``, if there are to be any. Step 0's logits are those after the
    prompt, so they depend on all that the prefill computed. ``on_progress`` gets what is being
    done, the tokens done and their total. Raises ValueError where prompt and steps exceed the
    context.
    """
    debug_paths(model)
    steps = room(model, len(prompt), options.max_tokens)
    options = replace(options, max_tokens=steps, seed=options.seed or 0)
    for reference in (False, True):  # the first touch of the weights is not to be timed
        _run(model, prompt[-1:], Options(1), reference, lambda what, done, total: None)
    fused = _run(model, prompt, options, False, on_progress, drafts)
    reference_run = _run(model, prompt, options, True, on_progress)
    return Comparison(fused, reference_run, _first_difference(fused, reference_run))


def format_comparison(comparison: Comparison) -> str:
    """The comparison as text; one line is ``bit-identical: yes`` or ``no``."""
    d = comparison.describe()
    lines = [f"{'':<11}{'prefill':>15}{'decode':>15}"]
    for name in ("fused", "reference"):
        prefill, decode = d[name]["prefill_tps"], d[name]["decode_tps"]
        lines.append(f"{name:<11}{_cell(prefill, 1, ' tok/s')}{_cell(decode, 1, ' tok/s')}")
    prefill, decode = d["speedup"]["prefill"], d["speedup"]["decode"]
    lines.append(f"{'ratio':<11}{_cell(prefill, 2, 'x')}{_cell(decode, 2, 'x')}")
    what = f"{d['steps']} steps of {d['logits_per_step']} logits, compared as integers"
    lines.append(f"{d['prompt_tokens']} prompt tokens; {what}")
    if difference := d["first_difference"]:
        lines.append(
            f"first difference: step {difference['step']}, {difference['logits']} logits, tokens"
            f" {difference['fused_token']} (fused) and {difference['reference_token']}"
        )
    lines.append(f"bit-identical: {'yes' if comparison.bit_identical else 'no'}")
    return "\n".join(lines)


@settled()
def _run(
    model: Model,
    prompt: Sequence[int],
    options: Options,
    reference: bool,
    on_progress: OnProgress,
    drafts: DraftOptions | None = None,
) -> Run:
    steps = options.max_tokens or 0
    path = "reference" if reference else "fused"
    drafting = Drafting.of(drafts, model)
    prefill_step_size = plan_prompt(model, len(prompt) + steps).prefill_step_size
    decoding = Decoding(model, prompt, options, model.make_cache(), prefill_step_size, drafting)
    found, ticks = [], [time.perf_counter()]
    streams = cast(list[mx.Stream], [generation_stream])
    run = decoding.steps(lambda done, n: on_progress(f"{path}, prompt", done, n))
    with paths.reference_path(reference), wired_limit(model, streams), closing(run):
        for step in run:
            ticks.append(time.perf_counter())
            found.append(step)
            on_progress(f"{path}, generation", len(found), steps)
    tokens, logits = [step.token for step in found], [step.logits[step.row] for step in found]
    seconds = [after - before for before, after in pairwise(ticks)]
    return Run(len(prompt), tokens, logits, seconds[0], seconds[1:], drafting is not None)


def _first_difference(fused: Run, reference: Run) -> dict[str, Any] | None:
    pairs = zip(fused.tokens, reference.tokens, fused.logits, reference.logits, strict=True)
    for step, (token_a, token_b, a, b) in enumerate(pairs):
        count = differing(a, b)
        if count or token_a != token_b:
            return {
                "step": step,
                "logits": count,
                "fused_token": token_a,
                "reference_token": token_b,
            }
    return None


def differing(a: mx.array, b: mx.array) -> int:
    """How many elements differ in their bits; all of them where shapes or dtypes differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.size, b.size)
    bits = _BITS[a.dtype.size]
    return cast(int, (a.view(bits) != b.view(bits)).sum().item())


def _cell(value: float | None, digits: int, unit: str) -> str:
    return f"{'-' if value is None else f'{value:,.{digits}f}{unit}':>15}"
