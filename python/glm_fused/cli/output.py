"""What commands print."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..generation.generate import Completion
    from ..streaming.banks import Streaming


def write(text: str) -> None:
    """Show a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def discard(_: str) -> None:
    """Show nothing."""


def print_json(document: dict[str, Any]) -> None:
    """Print a document as JSON; raises ValueError for NaN and infinities in it."""
    print(json.dumps(document, indent=1, allow_nan=False))


def print_summary(
    completion: Completion,
    sampling: dict[str, Any],
    streaming: Streaming | None,
    gathers: dict[str, Any] | None = None,
) -> None:
    """Print speeds, memory and how tokens were sampled, on stderr."""
    from ..memory import size
    from .ab import MEANINGFUL_TOKENS

    c, n = completion, len(completion.tokens)
    prompt = c.prompt_tps if c.prompt_tokens >= MEANINGFUL_TOKENS else None
    decode = c.generation_tps if n >= MEANINGFUL_TOKENS else None
    lines = [
        f"prompt      {c.prompt_tokens} tokens in {c.prompt_seconds:.2f} s{_speed(prompt)}",
        f"generated   {n} tokens{_speed(decode)} ({c.path}, {_sampling(sampling)})",
        f"peak memory {size(c.peak_memory_bytes)} in MLX arrays: weights, cache, slots of experts;"
        f" {size(c.peak_scratch_bytes)} in kernels; {size(c.planned_memory_bytes)} planned for"
        f" {c.prefill_step_size:,} tokens at a time; {size(c.peak_resident_bytes)} resident in all",
        f"cache       {size(c.kv_bytes)} in {c.kv_format} for {c.kv_tokens} tokens",
    ]
    if c.drafts is not None:
        lines.append(f"drafts      {_drafts(c.drafts)}")
    if streaming is not None:
        stats = streaming.stats()
        lines.append(
            f"experts     hit rate {stats['hit_rate'] or 0.0:.3f}, {size(stats['bytes'])} read,"
            f" {stats['wait_us'] / 1e6:.2f} s waited for"
        )
    if gathers is not None:
        lines.append(
            f"gathers     {gathers['gathers']} a token, {size(gathers['bytes'])}:"
            f" {1e3 * gathers['seconds']:.2f} of a step's {1e3 * gathers['step_seconds']:.2f} ms"
        )
    print("\n".join(lines), file=sys.stderr)


def _drafts(drafts: dict[str, Any]) -> str:
    """A text such as "auto from lookup, 12 of 20 accepted (0.75 0.50), 1.60 tokens a step"."""
    rates = " ".join(f"{rate:.2f}" for rate in drafts["acceptance"])
    lines = [f"{drafts['depth']} from {drafts['source']}"]
    lines.append(f"{drafts['accepted']} of {drafts['proposed']} accepted{rates and f' ({rates})'}")
    if drafts["tokens_per_step"]:
        lines.append(f"{drafts['tokens_per_step']:.2f} tokens a step")
    if drafts["gain"]:
        lines.append(f"{drafts['gain']:.2f} times as fast as plain steps")
    return ", ".join(lines)


def _speed(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f", {tokens_per_second:.1f} tok/s"


def _sampling(sampling: dict[str, Any]) -> str:
    """A text such as "temp 0.7, top_p 0.9; generation_config.json says top_p"."""
    names = ["temp"] if sampling["temp"] else []
    names += [
        name
        for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0), ("seed", None))
        if sampling["temp"] and sampling[name] != off
    ]
    names += ["repetition_penalty"] if sampling["repetition_penalty"] != 1 else []
    text = ", ".join(f"{name} {sampling[name]}" for name in names)
    text = text if sampling["temp"] else f"greedy{text and f', {text}'}"
    origin = [name for name in sampling["from_checkpoint"] if name in names]
    return text + (f"; generation_config.json says {', '.join(origin)}" if origin else "")
