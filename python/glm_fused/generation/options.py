"""How to generate: how many tokens, how they are sampled, where text ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_logits_processors

from ..checkpoint.folder import read_json
from ..validation import show
from .limits import SAMPLING
from .sampling import Shaper, shaper

GENERATION_CONFIG = "generation_config.json"
_KEYS = {"temperature": "temp"} | {  # keys of generation_config.json: what they are called here
    name: name for name in ("top_p", "top_k", "min_p", "repetition_penalty")
}


@dataclass(frozen=True)
class Options:
    """How to generate; sampling is mlx-lm's.

    Attributes:
        max_tokens: how many tokens at most; None: 256, or fewer where the context has less room.
        temp: temperature; 0 is greedy, and ``top_p``, ``top_k`` and ``min_p`` then do nothing.
        top_p: sample from the likeliest tokens that have this probability together; 1: from all.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        min_p: sample from tokens at least this likely, relative to the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur
            among the last ``repetition_context_size``; 1: none.
        repetition_context_size: how many tokens, of the prompt too, the penalty looks back.
        stop: texts that end generation; the generated text ends before the first that appears.
        seed: makes sampling reproducible; None gives another sample every time.

    Raises ValueError, naming the option, for a value that it cannot have.
    """

    max_tokens: int | None = None
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in SAMPLING.items():
            if not allowed.holds(value := getattr(self, name)):
                raise ValueError(f"[options] {name} is {show(value)}, expected {allowed.expected}.")
        _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"[options] stop is {show(self.stop)}, expected texts, none empty.")
        object.__setattr__(self, "stop", stop)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temp == 0

    def shaper(self, vocabulary: int) -> Shaper:
        """A function that takes log-probabilities [b, vocabulary] to the logits drawn from.

        Greedy decoding has none.
        """
        # mlx-lm refuses a top_k that keeps every token.
        top_k = self.top_k if self.top_k < vocabulary else 0
        return shaper(self.temp, self.top_p, self.min_p, top_k)

    def processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """Functions that take all tokens so far and logits [1, vocabulary] and return logits."""
        penalty = None if self.repetition_penalty == 1 else self.repetition_penalty
        processors: list[Callable[[mx.array, mx.array], mx.array]] = make_logits_processors(
            repetition_penalty=penalty, repetition_context_size=self.repetition_context_size
        )
        return processors

    def describe(self) -> dict[str, Any]:
        """The options as a JSON-ready dictionary."""
        return asdict(self) | {"stop": list(self.stop)}


def checkpoint_options(folder: Path) -> Options:
    """What generation_config.json in a checkpoint's folder asks for; greedy decoding without one.

    As transformers has it, tokens are sampled only where ``do_sample`` is true. Raises ValueError,
    naming file and key, for a value that a key cannot have.
    """
    file = folder / GENERATION_CONFIG
    if not file.exists():
        return Options()
    config = {key: value for key, value in read_json(file).items() if value is not None}
    found: dict[str, Any] = {}
    for key, name in _KEYS.items():
        if key in config:
            if not SAMPLING[name].holds(config[key]):
                raise ValueError(
                    f"[checkpoint] {file}: {key} is {show(config[key])}, expected"
                    f" {SAMPLING[name].expected}."
                )
            found[name] = config[key]
    sample = config.get("do_sample", False)
    if type(sample) is not bool:
        raise ValueError(
            f"[checkpoint] {file}: do_sample is {show(sample)}, expected true or false."
        )
    if not sample:
        found = {name: v for name, v in found.items() if name == "repetition_penalty"}
    return Options(**({"temp": 1.0} if sample else {}) | found)


def set_defaults(model: nn.Module, options: Options) -> None:
    """Have generation with ``model`` take ``options`` where a caller gives none."""
    model.options = options


def defaults_of(model: nn.Module) -> Options:
    """The options that `set_defaults` gave the model, or greedy decoding without limits."""
    options = getattr(model, "options", None)
    return options if isinstance(options, Options) else Options()


def changed_options(options: Options, changes: Mapping[str, Any]) -> Options:
    """The options with others in place of some, by name; raises ValueError for an unknown name."""
    unknown = changes.keys() - asdict(options).keys()
    if unknown:
        raise ValueError(
            f"[generate] {', '.join(sorted(unknown))}: no such option; there are"
            f" {', '.join(asdict(options))}."
        )
    return replace(options, **changes)


def changed(options: Options) -> list[str]:
    """The names of options that differ from greedy decoding without limits."""
    plain = Options()
    return [f.name for f in fields(Options) if getattr(options, f.name) != getattr(plain, f.name)]


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        text = f"an integer from {low} to {high}"
        raise ValueError(f"[options] {name} is {show(value)}, expected {text}.")
