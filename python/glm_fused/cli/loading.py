"""Loads a model as the options of a command say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.limits import OFF
from .arguments import UsageError, flags, parsed_size
from .progress import steps

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine_options import EngineOptions
    from ..models.line import Line
    from ..models.ranks import Ranks

STREAMING = (
    "memory_budget", "slots", "sidecar", "context", "policy", "pins", "lookahead", "direct_io",
    "read_depth", "read_split", "trace",
)  # fmt: skip


def engine_options(
    options: argparse.Namespace, context: int, ranks: Ranks | Line | None = None
) -> EngineOptions:
    """The engine's options, from what `add_kv_format`, `add_prefill_step` and `add_streaming` add.

    `add_drafts` may have added its own. Memory is planned for ``context`` tokens unless
    ``--context`` says otherwise. ``ranks`` share the model. Raises UsageError for options that do
    not fit together.
    """
    from ..engine_options import EngineOptions, idle_options
    from ..streaming.pins import read_pins

    values: dict[str, Any] = {name: getattr(options, name) for name in STREAMING}
    given = {name: value for name, value in values.items() if value is not None}
    if idle := idle_options(given):
        raise UsageError(f"{flags(idle)}: needs --memory-budget, --slots or --sidecar.")
    if ("pins" in given) != (given.get("policy") == "pinned"):
        raise UsageError("--pins and --policy pinned need one another.")
    given.pop("trace", None)
    if given.get("memory_budget", "auto") != "auto":
        given["memory_budget"] = parsed_size("--memory-budget", options.memory_budget)
    if "read_split" in given:
        given["read_split"] = parsed_size("--read-split", options.read_split)
    if "pins" in given:
        given["pins"] = read_pins(Path(options.pins))
    given |= _drafts(options)
    return EngineOptions(
        kv_format=options.kv_format,
        default_context=context,
        prefill_step_size=options.prefill_step_size,
        ranks=ranks,
        **given,
    )


def _drafts(options: argparse.Namespace) -> dict[str, Any]:
    from ..checkpoint.hub import local_model

    names = ("draft", "draft_from")
    given = {name: found for name in names if (found := getattr(options, name, None)) is not None}
    if given.get("draft") == OFF and "draft_from" in given:
        raise UsageError("--draft-from: needs --draft.")
    if "draft_from" in given:
        given["draft_from"] = local_model(given["draft_from"])
    return given


def open_engine(
    path: str | Path, threads: int | None, options: EngineOptions | None = None
) -> Engine:
    """Set the number of ``threads``, if given, and load the checkpoint that ``path`` means.

    A model of the Hub is downloaded first. A terminal shows how many kernels have been compiled.
    """
    from .. import set_num_threads
    from ..checkpoint.hub import local_model
    from ..checkpoint.paths import DEMO, checkpoint_path
    from ..engine import Engine

    found = checkpoint_path(local_model(path))
    if path == DEMO and found == Path(DEMO):
        print(f"{DEMO} is the folder ./{DEMO} here, not the bundled model.", file=sys.stderr)
    if threads is not None:
        set_num_threads(threads)
    with steps() as step:
        return Engine(
            found,
            options,
            on_compile=lambda done, total: step(f"compiling kernels: {done} of {total}"),
        )
