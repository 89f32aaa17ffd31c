"""How an engine loads a model, with the checks that the command line makes too."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .formats.kv_rows import check_kv_format
from .generation.drafts.options import check_depth
from .generation.limits import LOOKUP, MIXED, MTP, OFF
from .memory import parse_size
from .models.line import Line
from .models.ranks import Ranks
from .streaming.options import DEFAULT_CONTEXT, POLICIES, RANGES, StreamOptions
from .validation import show

STARTING = ("memory_budget", "slots", "sidecar")
_NAMES = {  # what `StreamOptions` calls the options that have other names here
    "memory_budget": "budget",
    "lookahead": "spares",
    "direct_io": "direct",
    "read_depth": "depth",
    "read_split": "split",
}
_STREAMING = (
    *STARTING, "context", "policy", "pins", "lookahead", "direct_io", "read_depth", "read_split",
)  # fmt: skip


@dataclass(frozen=True)
class EngineOptions:
    """How `Engine` loads a model; the command line's options have the same names.

    With any of ``memory_budget``, ``slots`` and ``sidecar`` routed experts are streamed; the
    options listed after them need one of the three. None stands for the usual value.

    Attributes:
        kv_format: how caches store keys: "auto" (as the activations), "bf16", "fp16", "fp32",
            "fp8" or "int8".
        memory_budget: bytes that the process may keep resident: a number, a text with its unit
            such as "24GB", or "auto", which is what this machine affords.
        slots: experts resident per layer, in place of as many as the budget allows.
        sidecar: the folder of a packed sidecar to read experts from, in place of the checkpoint.
        context: tokens to keep room for in the cache. A prompt and what follows it may have as
            many; without it, ``default_context`` or the model's own, whichever is less.
        policy: which expert gives way: "learned" (usual), "lru", "s3fifo" or "pinned".
        pins: experts that stay once they are read, by layer; for "pinned" and only for it.
        lookahead: slots per layer for what the next layer's router may choose; usually 0.
        direct_io: whether to read past the page cache; usually not.
        read_depth: reads in flight; usually 16.
        read_split: bytes per read, a multiple of 4096, or a text such as "1MiB", the usual value.
        default_context: tokens to plan for where ``context`` does not say.
        prefill_step_size: how many tokens of a prompt the model takes at a time; None: as many as
            fit in ``memory_budget``, or in the machine's memory, up to 2,048.
        prompt_cache: bytes to plan for the caches of earlier prompts (`Engine.prompt_store`), a
            number or a text with its unit; usually none.
        draft: how many tokens to guess ahead, 1 to 8, or "auto": as many as pay; "off" for none.
            Whatever it is, a text does not change, greedy or sampled with a seed.
        draft_from: what guesses: "mtp", the checkpoint's layer for it, which is loaded then;
            "lookup", what followed the last tokens earlier in the text; "mtp+lookup", each time
            the one that pays; or the folder of a small model of the same vocabulary, any that
            mlx-lm loads. None: "mtp+lookup" where the checkpoint has the layer, else "lookup".
        ranks: the processes that share the model, each of which has to make the same calls; they
            need ``prefill_step_size`` and take no small model for drafts; those that have rows
            take no ``sidecar`` with checksums, which are of whole experts. None: this one alone.

    Raises ValueError, naming the option, for a value that it cannot have and for one that would do
    nothing.
    """

    kv_format: str = "auto"
    memory_budget: int | str | None = None
    slots: int | None = None
    sidecar: str | os.PathLike[str] | None = None
    context: int | None = None
    policy: str | None = None
    pins: Mapping[int, Sequence[int]] | None = None
    lookahead: int | None = None
    direct_io: bool | None = None
    read_depth: int | None = None
    read_split: int | str | None = None
    default_context: int = DEFAULT_CONTEXT
    prefill_step_size: int | None = None
    prompt_cache: int | str | None = None
    draft: int | str = OFF
    draft_from: str | os.PathLike[str] | None = None
    ranks: Ranks | Line | None = None

    def __post_init__(self) -> None:
        check_kv_format(self.kv_format)
        for name, (low, high) in (*RANGES.items(), ("default_context", RANGES["context"])):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                expected = f"an integer from {low} to {high}"
                raise ValueError(f"[engine] {name} is {show(value)}, expected {expected}.")
        for name in ("memory_budget", "read_split", "prompt_cache"):
            _bytes(name, getattr(self, name))
        if self.policy is not None and self.policy not in POLICIES:
            expected = f"one of {', '.join(POLICIES)}"
            raise ValueError(f"[engine] policy is {show(self.policy)}, expected {expected}.")
        if idle := idle_options(self._given()):
            needed = "memory_budget, slots or sidecar"
            raise ValueError(f"[engine] {', '.join(idle)}: needs {needed}.")
        if (self.pins is not None) != (self.policy == "pinned"):
            raise ValueError("[engine] pins and policy 'pinned' need one another.")
        if self.draft == OFF and self.draft_from is not None:
            raise ValueError("[engine] draft_from: needs draft.")
        if self.draft != OFF:
            check_depth(self.draft)
        if self.ranks is not None and self.prefill_step_size is None:
            raise ValueError("[engine] ranks: need prefill_step_size, the same for all.")
        if self.ranks is not None and self.draft_from not in (None, MTP, LOOKUP, MIXED):
            found, expected = show(self.draft_from), f"{MTP!r}, {LOOKUP!r} or {MIXED!r}"
            raise ValueError(f"[engine] draft_from is {found}, expected {expected} for ranks.")

    def _given(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _STREAMING}
        return {name: value for name, value in values.items() if value is not None}

    def stream_options(self) -> StreamOptions | None:
        """How to stream experts; None where no option asks for it."""
        given = self._given()
        if not given:
            return None
        for name in ("memory_budget", "read_split"):
            if name in given:
                given[name] = _bytes(name, given[name])
        options = {_NAMES.get(name, name): value for name, value in given.items()}
        prompts = self.prompt_cache_bytes
        return StreamOptions(default_context=self.default_context, prompts=prompts, **options)

    @property
    def prompt_cache_bytes(self) -> int:
        """The bytes that ``prompt_cache`` stands for."""
        return _bytes("prompt_cache", self.prompt_cache) or 0


def idle_options(given: Collection[str]) -> list[str]:
    """The names among ``given`` options of streaming that do nothing without a `STARTING` one."""
    return [] if set(given) & set(STARTING) else list(given)


def _bytes(name: str, value: object) -> int | None:
    """The number of bytes that ``value`` stands for; None where it is None or "auto"."""
    if value is None or (name == "memory_budget" and value == "auto"):
        return None
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as error:
            raise ValueError(f"[engine] {name}: {error}.") from None
    if type(value) is not int or not 0 < value < 2**63:
        expected = "a number of bytes, or a text such as 24GB"
        raise ValueError(f"[engine] {name} is {show(value)}, expected {expected}.")
    return value
