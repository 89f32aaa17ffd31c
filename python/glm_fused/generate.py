"""Streaming generation, and the run that compares the fused path with the reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, stream_generate, wired_limit
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import _ext, ops, paths
from .model import Model
from .moe import MoE

_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


@dataclass(frozen=True)
class Options:
    """How to generate. ``temp`` 0 is greedy; ``seed`` None is another sample every time."""

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def sampler(self) -> Callable[[mx.array], mx.array]:
        return make_sampler(self.temp, self.top_p)


@dataclass(frozen=True)
class Completion:
    """A generated text. ``tokens`` ends with the stop token where ``finish_reason`` is "stop"."""

    text: str
    tokens: list[int]
    finish_reason: str
    path: str
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float | None
    peak_memory_bytes: int

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"generation_tokens": len(self.tokens)}


def encode(model: Model, tokenizer: TokenizerWrapper, prompt: str, raw: bool = False) -> list[int]:
    """The prompt's tokens, within the chat template unless ``raw`` or the model has none.

    Raises ValueError for a prompt that is empty, longer than the context, or not text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8.") from None
    if raw or not tokenizer.has_chat_template:
        tokens = tokenizer.encode(prompt)
    else:
        message = {"role": "user", "content": prompt}
        render = cast(Callable[..., list[int]], tokenizer.apply_chat_template)
        tokens = render([message], add_generation_prompt=True)
    limit = model.args.max_position_embeddings
    if not 0 < len(tokens) < limit:
        raise ValueError(f"the prompt is {len(tokens)} tokens, expected 1 to {limit - 1}.")
    if max(tokens) >= model.args.vocab_size:
        raise ValueError(
            f"the tokenizer gave token {max(tokens)}, but the model's vocabulary has"
            f" {model.args.vocab_size}: they do not belong together."
        )
    return list(tokens)


def generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    options: Options,
    on_text: Callable[[str], None] = lambda text: None,
) -> Completion:
    """Generate on the current path; ``on_text`` gets each piece of text as it is ready."""
    debug_paths(model)
    if options.seed is not None:
        mx.random.seed(options.seed)
    mx.reset_peak_memory()
    text, tokens, ticks, response = "", [], [], None
    for response in stream_generate(
        model, tokenizer, list(prompt), options.max_tokens, sampler=options.sampler()
    ):
        ticks.append(time.perf_counter())
        tokens.append(int(response.token))
        text += response.text
        on_text(response.text)
    assert response is not None  # even a stop token at once gives one
    return Completion(
        text=text,
        tokens=tokens,
        finish_reason=response.finish_reason or "length",
        path="reference" if paths.use_reference() else "fused",
        prompt_tokens=len(prompt),
        prompt_tps=response.prompt_tps,
        generation_tps=_ratio(len(ticks) - 1, ticks[-1] - ticks[0]),
        peak_memory_bytes=mx.get_peak_memory(),
    )


@dataclass(frozen=True)
class Run:
    """What one path computed: per step the token and the logits it was chosen from."""

    prompt_tokens: int
    tokens: list[int]
    logits: list[mx.array]
    prefill_seconds: float
    step_seconds: list[float]

    @property
    def prefill_tps(self) -> float | None:
        return _ratio(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tps(self) -> float | None:
        """Tokens per second of the median step; None where there is only the first token."""
        return _ratio(1, statistics.median(self.step_seconds)) if self.step_seconds else None


@dataclass(frozen=True)
class Comparison:
    """Fused and reference run of one prompt."""

    fused: Run
    reference: Run
    first_difference: dict[str, Any] | None

    @property
    def bit_identical(self) -> bool:
        return self.first_difference is None

    def describe(self) -> dict[str, Any]:
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
                "prefill": _ratio(fused.prefill_tps, reference.prefill_tps),
                "decode": _ratio(fused.decode_tps, reference.decode_tps),
            },
        }


def compare(model: Model, prompt: Sequence[int], options: Options) -> Comparison:
    """Run both paths from fresh caches for ``max_tokens`` steps; stop tokens do not end them.

    Step 0's logits are those after the prompt, so they depend on all that the prefill computed.
    """
    debug_paths(model)
    for reference in (False, True):  # the first touch of the weights is not to be timed
        _run(model, prompt[-1:], Options(max_tokens=1), reference)
    fused, reference_run = (_run(model, prompt, options, which) for which in (False, True))
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


def debug_paths(model: Model) -> None:
    """With ``GLM_FUSED_DEBUG``, say which path each layer takes and why."""
    if not paths.flag("GLM_FUSED_DEBUG"):
        return
    if mx.default_device() == mx.gpu:
        path = "stock MLX ops (the default device is a GPU)"
    elif paths.use_reference():
        path = "reference (asked for)"
    else:
        path = f"fused ({_ext.cpu_kernels()}, {_ext.num_threads()} threads)"
    for i, layer in enumerate(model.layers):
        indexer = "full" if "indexer" in layer.self_attn else "shared"
        mlp = layer.mlp.switch_mlp if isinstance(layer.mlp, MoE) else layer.mlp
        weights = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        formats = "/".join(_format(projection.as_weight()) for projection in weights)
        kind = "moe_decode" if isinstance(layer.mlp, MoE) else "dense mlp"
        paths.debug("layer %d: %s indexer, %s %s: %s", i, indexer, kind, formats, path)


def _run(model: Model, prompt: Sequence[int], options: Options, reference: bool) -> Run:
    logits: list[mx.array] = []

    def record(_: mx.array, step_logits: mx.array) -> mx.array:
        logits.append(step_logits)
        return step_logits

    mx.random.seed(options.seed or 0)
    tokens, ticks = [], [time.perf_counter()]
    streams = cast(list[mx.Stream], [generation_stream])
    with paths.reference_path(reference), wired_limit(model, streams):
        for token, _ in generate_step(
            mx.array(list(prompt)),
            model,
            max_tokens=options.max_tokens,
            sampler=options.sampler(),
            logits_processors=[record],
            prompt_cache=model.make_cache(),
        ):
            ticks.append(time.perf_counter())
            tokens.append(int(token))
    seconds = [after - before for before, after in pairwise(ticks)]
    return Run(len(prompt), tokens, logits[: len(tokens)], seconds[0], seconds[1:])


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
    """How many elements differ in their bits; all of them where shape or dtype do."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.size, b.size)
    bits = _BITS[a.dtype.size]
    return cast(int, (a.view(bits) != b.view(bits)).sum().item())


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _cell(value: float | None, digits: int, unit: str) -> str:
    return f"{'-' if value is None else f'{value:,.{digits}f}{unit}':>15}"


def _format(weight: ops.Weight) -> str:
    return f"{weight.mode}{weight.bits}" if weight.mode == "affine" else weight.mode
