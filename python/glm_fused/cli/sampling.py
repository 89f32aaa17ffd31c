"""The options of sampling: those of the command line, in place of the checkpoint's own."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..generation.limits import SAMPLING
from . import arguments
from .arguments import UsageError, flags

if TYPE_CHECKING:
    from ..generation.options import Options


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, all of which default to None, and --seed."""
    text = (
        "as in mlx-lm; defaults are those of the checkpoint's generation_config.json, greedy "
        "without one or\nwhere its do_sample is not true"
    )
    add = parser.add_argument_group("sampling", text).add_argument
    for name, metavar, help in (
        ("temp", "T", "temperature; 0: greedy"),
        ("top_p", "P", "sample from the likeliest tokens of this probability together"),
        ("top_k", "K", "sample from this many of the likeliest tokens; 0: from all"),
        ("min_p", "P", "sample from tokens this likely, relative to the likeliest"),
        ("repetition_penalty", "X", "make repeated tokens less likely; 1: do not"),
        ("repetition_context_size", "N", "tokens that the penalty looks back (default: 20)"),
    ):
        kind = arguments.within(SAMPLING[name])
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    kind = arguments.integer(0, 2**64 - 1)
    add("--seed", type=kind, metavar="S", help="makes sampling reproducible")


def how_to_generate(options: argparse.Namespace, defaults: Options) -> Options:
    """What the checkpoint asks for, with what the command line says instead.

    ``options`` also have ``max_tokens`` and may have ``stop``. Raises UsageError for options that
    would do nothing.
    """
    values = {name: getattr(options, name) for name in SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    seed = {} if options.seed is None else {"seed": options.seed}
    stop = tuple(getattr(options, "stop", None) or ())
    how = replace(defaults, max_tokens=options.max_tokens, stop=stop, **seed, **given)
    _check_sampling(how, given)
    return how


def _check_sampling(how: Options, given: dict[str, Any]) -> None:
    """Refuse options that would do nothing.

    A seed is not refused, because greedy decoding is as reproducible as a seed asks for. Nor is an
    option with the value that means "do nothing", such as --top-p 1.
    """
    from ..generation.options import changed

    asked = [name for name in given if name in changed(how)]
    idle = [name for name in ("top_p", "top_k", "min_p") if how.greedy and name in asked]
    if idle:
        raise UsageError(
            f"{flags(idle)}: greedy decoding always takes the likeliest token; give --temp above"
            " 0 too."
        )
    if "repetition_context_size" in given and how.repetition_penalty == 1:
        raise UsageError("--repetition-context-size needs --repetition-penalty.")
