"""Arguments that several commands take: their types, options and groups of options.

An argument that is wrong by itself is argparse's error; those that do not fit together are a
`UsageError`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from ..checkpoint.hub_names import FORM
from ..formats.kv_rows import KV_FORMATS
from ..generation.limits import AUTO, LOOKUP, MIXED, MOST_DRAFTS, MTP, OFF, Range
from ..memory import parse_size
from ..streaming.options import DEFAULT_CONTEXT, POLICIES, RANGES
from ..validation import show

MODEL = (
    "folder of a checkpoint, a GGUF file (of shards the first), a model of the Hugging Face Hub,"
    f'\n{FORM}, or "demo", the bundled one'
)
MAX_THREADS = 1024


class UsageError(ValueError):
    """Arguments do not fit together; the command line says so and where its help is."""


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from ``low`` to ``high``."""
    return _parser(int, lambda value: low <= value <= high, f"an integer from {low} to {high}")


def number(valid: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """The type of an argument that is a ``valid`` number; ``expected`` says which are."""
    return _parser(float, valid, expected)


def within(allowed: Range) -> Callable[[str], Any]:
    """The type of an argument that is a value of an option of generation."""
    return _parser(allowed.kind, allowed.valid, allowed.expected)


def path(text: str) -> str:
    """The type of a path; an empty text is refused, because it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return text


def words(text: str) -> str:
    """The type of a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text that is not empty")
    return text


def _parser(
    kind: type[int] | type[float], valid: Callable[[float], bool], expected: str
) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
            fits = valid(value)
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"expected {expected}: {show(text)}")
        return value

    return parse


def flags(names: Iterable[str]) -> str:
    """Options as they are typed, given their names in a namespace."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def parsed_size(flag: str, text: str) -> int:
    """The bytes of a text such as 24GB; raises UsageError, naming the flag, for others."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def new_file(text: str) -> Path:
    """The type of a file to write later; it is refused now where it cannot be written."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{text} is a folder, expected a file to write.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist, to write {path.name} into.")
    return path


def read_prompt(text: str) -> str:
    """The prompt, which is on stdin where the argument is "-"."""
    if text != "-":
        return text
    if sys.stdin is None:  # Python makes None of a closed stdin
        raise ValueError("--prompt -: stdin is closed.")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ValueError("--prompt -: stdin is not valid UTF-8.") from None


def add_length(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --max-tokens, whose help shows the ``default``."""
    kind = integer(1, 2**31 - 1)
    text = f"tokens to generate (default: {default})"
    parser.add_argument("--max-tokens", type=kind, metavar="N", help=text)


def add_kv_format(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add --kv-format; ``of`` says in its help which cache it is for."""
    text = f"how the cache{of} stores keys (default: as the activations)"
    parser.add_argument("--kv-format", choices=KV_FORMATS, default="auto", help=text)


def add_prefill_step(parser: argparse.ArgumentParser) -> None:
    """Add --prefill-step-size."""
    kind = integer(*RANGES["prefill_step_size"])
    text = "tokens of a prompt at a time (default: as many as fit in memory, up to 2048)"
    parser.add_argument("--prefill-step-size", type=kind, metavar="N", help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    threads = integer(1, MAX_THREADS)
    parser.add_argument("--threads", type=threads, metavar="N", help="of the CPU kernels")


def add_drafts(parser: argparse.ArgumentParser) -> None:
    """Add --draft and --draft-from."""
    text = "guess tokens ahead, which the model takes together; texts stay the same, or as likely"
    add = parser.add_argument_group("drafts", text).add_argument
    help = f"guess N tokens at a time, 1 to {MOST_DRAFTS}; auto: as many as pay; off (usual): none"
    add("--draft", type=_draft, default=OFF, metavar="N|auto|off", help=help)
    help = (
        f"what guesses: {MTP}, the model's layer for it; {LOOKUP}, the text so far; {MIXED}; or the"
        f"\nfolder of a small model (default: {MIXED} where the checkpoint has the layer, else"
        f" {LOOKUP})"
    )
    add("--draft-from", type=path, metavar=f"{MTP}|{LOOKUP}|{MIXED}|PATH", help=help)


def _draft(text: str) -> int | str:
    if text in (AUTO, OFF):
        return text
    expected = f"{AUTO}, {OFF} or an integer from 1 to {MOST_DRAFTS}"
    return cast(int, _parser(int, lambda n: 1 <= n <= MOST_DRAFTS, expected)(text))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_streaming(parser: argparse.ArgumentParser, trace: bool = True) -> None:
    """Add the options of streaming, all of which default to None: it means "not asked for".

    Without ``trace`` there is no --trace, for a command whose requests mean nothing.
    """
    text = "run a model larger than memory; the first three turn it on, the others need one of them"
    group = parser.add_argument_group("expert streaming", text)
    add = group.add_argument
    add(
        "--memory-budget",
        metavar="SIZE",
        help="keep within 24GB, say, reading experts as needed; or auto",
    )
    add("--slots", type=integer(*RANGES["slots"]), metavar="N", help="experts resident per layer")
    help = "read experts from a sidecar that `glm-fused sidecar` or Flash-MoE made"
    add("--sidecar", type=path, metavar="DIR", help=help)
    help = f"tokens to plan the cache for (default: {DEFAULT_CONTEXT} and those to generate)"
    add("--context", type=integer(*RANGES["context"]), metavar="N", help=help)
    help = f"which expert gives way: {', '.join(POLICIES)} (default: {POLICIES[0]})"
    add("--policy", choices=POLICIES, metavar="NAME", help=help)
    help = "JSON, {layer: [experts]}, for --policy pinned"
    add("--pins", type=path, metavar="FILE", help=help)
    help = "slots per layer for what the next layer's router may choose (default: 0)"
    add("--lookahead", type=integer(*RANGES["lookahead"]), metavar="N", help=help)
    add("--direct-io", action="store_true", default=None, help="read past the page cache")
    help = "reads in flight (default: 16)"
    add("--read-depth", type=integer(*RANGES["read_depth"]), metavar="N", help=help)
    add("--read-split", metavar="SIZE", help="bytes per read (default: 1MiB)")
    if not trace:
        parser.set_defaults(trace=None)
        return
    help = "write every request for experts, as JSON lines"
    add("--trace", type=path, metavar="FILE", help=help)
