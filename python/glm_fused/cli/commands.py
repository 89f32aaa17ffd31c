"""What each ``glm-fused`` command does; all return an exit code.

They import what they need when they run, so that help is quick and ``doctor`` works where the
compiled extension does not load.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DEFAULT_CONTEXT, DEFAULT_TOKENS, SAMPLING, UsageError
from .commands_streaming import stream_options
from .output import discard, print_json, print_summary, write
from .progress import Progress

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..generation.options import Options
    from ..models.decoder import Model
    from ..streaming.banks import StreamOptions


def run_generate(args: argparse.Namespace) -> int:
    from ..generation.prompts import encode

    _check_ab(args)
    if args.trace is not None:
        _new_file(args.trace)
    prompt = _read_prompt(args.prompt)
    stream = stream_options(args, DEFAULT_CONTEXT + (args.max_tokens or DEFAULT_TOKENS))
    model, tokenizer = _load(args.model, args, stream)
    if model.streaming is not None:
        print(model.streaming.plan.format(), file=sys.stderr)
    options = _options(args, model.options)
    tokens = encode(model, tokenizer, prompt, args.raw)
    run = _compare if args.ab else _generate
    with Progress() as progress:
        return run(args, model, tokenizer, tokens, options, progress)


def _generate(
    args: argparse.Namespace,
    model: Model,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    options: Options,
    progress: Progress,
) -> int:
    from ..generation.generate import generate

    def on_progress(what: str, done: int, total: int) -> None:
        if args.json or what == "prompt":  # a text shows how its generation goes on
            progress(what, done, total)

    sampling = options.describe() | {"from_checkpoint": _from_checkpoint(args, model)}
    with _traced(model, args.trace, discard if args.json else write) as on_text:
        completion = generate(model, tokenizer, tokens, options, on_text, on_progress=on_progress)
    if args.json:
        streaming = {"streaming": model.streaming.stats()} if model.streaming else {}
        print_json(completion.describe() | {"sampling": sampling} | streaming)
    else:
        print()
    if args.verbose or (sys.stderr.isatty() and not args.json):
        print_summary(completion, sampling, model.streaming)
    return 0


def _compare(
    args: argparse.Namespace,
    model: Model,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    options: Options,
    progress: Progress,
) -> int:
    from .ab import compare, format_comparison

    comparison = compare(model, tokens, options, progress)
    sampling = options.describe() | {"from_checkpoint": _from_checkpoint(args, model)}
    if args.json:
        text = tokenizer.decode(comparison.fused.tokens)
        print_json(comparison.describe() | {"text": text, "sampling": sampling})
    else:
        print(format_comparison(comparison))
    return 0 if comparison.bit_identical else 1


def _check_ab(args: argparse.Namespace) -> None:
    """Refuse what a comparison would ignore."""
    ignored = [name for name in ("stop", "trace") if args.ab and getattr(args, name)]
    if ignored:
        raise UsageError(
            f"{_flags(ignored)}: not with --ab, which runs both paths for all of --max-tokens."
        )


def _options(args: argparse.Namespace, defaults: Options) -> Options:
    """What the checkpoint asks for, with what the command line says in its place."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    seed = {} if args.seed is None else {"seed": args.seed}
    options = replace(
        defaults, max_tokens=args.max_tokens, stop=tuple(args.stop or ()), **seed, **given
    )
    _check_sampling(options, given)
    return options


def _check_sampling(options: Options, given: dict[str, Any]) -> None:
    """Refuse options that would do nothing.

    A seed is none of them: greedy decoding is as reproducible as it asks for. Nor is an option
    with the value that means "do nothing", such as --top-p 1.
    """
    from ..generation.options import changed

    asked = [name for name in given if name in changed(options)]
    idle = [name for name in ("top_p", "top_k", "min_p") if options.greedy and name in asked]
    if idle:
        raise UsageError(
            f"{_flags(idle)}: greedy decoding always takes the likeliest token; give --temp above"
            " 0 too."
        )
    if "repetition_context_size" in given and options.repetition_penalty == 1:
        raise UsageError("--repetition-context-size needs --repetition-penalty.")


def _from_checkpoint(args: argparse.Namespace, model: Model) -> list[str]:
    """Options that the checkpoint's generation_config.json decided."""
    from ..generation.options import changed

    return [name for name in changed(model.options) if getattr(args, name) is None]


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def run_demo(args: argparse.Namespace) -> int:
    from ..generation.options import Options
    from . import demo

    prompt = demo.PROMPT if args.prompt is None else _read_prompt(args.prompt)
    model, tokenizer = _load(demo.checkpoint_folder(), args)
    options = Options(
        max_tokens=demo.MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        temp=demo.TEMP,
        top_p=demo.TOP_P,
        seed=demo.SEED,
    )
    with Progress() as progress:
        show = discard if args.json else write
        result = demo.run(model, tokenizer, prompt, options, show, progress)
    if args.json:
        print_json(result)
    return 0 if result["ab"]["bit_identical"] else 1


def run_doctor(args: argparse.Namespace) -> int:
    from ..selftest import doctor

    result = doctor.examine(args.threads)
    if args.json:
        print_json(result)
    else:
        print(doctor.format_result(result))
    return 0 if result["ok"] else 1


def run_inspect(args: argparse.Namespace) -> int:
    from ..checkpoint.description import describe, format_report

    description = describe(args.path)
    if args.json:
        print_json(description)
    else:
        print(format_report(description))
    return 0


def run_selftest(args: argparse.Namespace) -> int:
    from .. import set_num_threads
    from ..selftest import report

    target = None if args.json in (None, "-") else _new_file(args.json)
    if args.threads is not None:
        set_num_threads(args.threads)
    with _steps() as step:
        result = report.examine(args.backend, quick=args.quick, bench=args.bench, step=step)
    if args.json == "-":
        print_json(result)
    else:
        print(report.format_report(result))
    if target is not None:
        report.write(result, target)
        print(f"report written to {target}")
    return 0 if result["ok"] else 1


def _new_file(text: str) -> Path:
    """A file to write later; refused now where it cannot be."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{text} is a folder, expected a file to write.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist, to write {path.name} into.")
    return path


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on a terminal."""
    from tqdm import tqdm

    with tqdm(bar_format="{elapsed} {desc}", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.set_description_str


@contextlib.contextmanager
def _traced(
    model: Model, path: str | None, write: Callable[[str], None]
) -> Iterator[Callable[[str], None]]:
    """``write``, which also appends to the trace file, if there is to be one."""
    if path is None:
        yield write
        return
    from ..streaming.replay import TraceWriter

    assert model.streaming is not None  # or --trace was refused
    with open(path, "w") as file:
        trace = TraceWriter(model.streaming, file, model.args.num_experts_per_tok)

        def both(text: str) -> None:
            trace.write()
            write(text)

        yield both
        trace.write()


def _load(
    path: str | Path, args: argparse.Namespace, stream: StreamOptions | None = None
) -> tuple[Model, TokenizerWrapper]:
    from .. import load, set_num_threads
    from ..checkpoint.paths import DEMO, checkpoint_folder

    folder = checkpoint_folder(path)
    if path == DEMO and folder == Path(DEMO):
        print(f"{DEMO} is the folder ./{DEMO} here, not the bundled model.", file=sys.stderr)
    if args.threads is not None:
        set_num_threads(args.threads)
    if not (folder / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer_config.json.")
    return load(folder, kv_format=args.kv_format, stream=stream)


def _read_prompt(text: str) -> str:
    if text != "-":
        return text
    if sys.stdin is None:  # what Python makes of a closed one
        raise ValueError("--prompt -: stdin is closed.")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ValueError("--prompt -: stdin is not valid UTF-8.") from None
