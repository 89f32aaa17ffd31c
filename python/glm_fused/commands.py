"""What each ``glm-fused`` command does; all return an exit code.

They import what they need when they run, so that help is quick and ``doctor`` works where the
compiled extension does not load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands_streaming import stream_options

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .generate import Completion, Options
    from .model import Model
    from .streaming import StreamOptions

DEFAULT_CONTEXT = 4096  # tokens of a prompt that memory is planned for, unless more are asked for


def run_generate(args: argparse.Namespace) -> int:
    from .generate import Options, encode, generate

    prompt = _read_prompt(args.prompt)
    stream = stream_options(args, DEFAULT_CONTEXT + args.max_tokens)
    model, tokenizer = _load(_folder(args.model), args, stream)
    if model.streaming is not None:
        print(model.streaming.plan.format(), file=sys.stderr)
    tokens = encode(model, tokenizer, prompt, args.raw)
    options = Options(args.max_tokens, args.temp, args.top_p, args.seed)
    if stream is not None and len(tokens) + args.max_tokens > stream.context:
        raise ValueError(
            f"{len(tokens)} prompt tokens and {args.max_tokens} more exceed the"
            f" {stream.context} that memory was planned for; give --context."
        )
    if args.ab:
        return _compare(model, tokenizer, tokens, options, args.json)
    write = _discard if args.json else _write
    with _traced(model, args.trace, write) as on_text:
        completion = generate(model, tokenizer, tokens, options, on_text)
    if args.json:
        streaming = {"streaming": model.streaming.stats()} if model.streaming else {}
        _print_json(completion.describe() | streaming)
        return 0
    print()
    if args.verbose or sys.stderr.isatty():
        _print_speeds(completion)
        _print_streaming(model)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from . import demo
    from .generate import Options

    prompt = demo.PROMPT if args.prompt is None else _read_prompt(args.prompt)
    model, tokenizer = _load(demo.checkpoint_folder(), args)
    write = _discard if args.json else _write
    options = Options(args.max_tokens, demo.TEMP, demo.TOP_P, demo.SEED)
    result = demo.run(model, tokenizer, prompt, options, write)
    if args.json:
        _print_json(result)
    return 0 if result["ab"]["bit_identical"] else 1


def run_doctor(args: argparse.Namespace) -> int:
    from . import doctor

    result = doctor.examine(args.threads)
    if args.json:
        _print_json(result)
    else:
        print(doctor.format_result(result))
    return 0 if result["ok"] else 1


def run_inspect(args: argparse.Namespace) -> int:
    from .report import describe, format_report

    description = describe(_folder(args.path))
    if args.json:
        _print_json(description)
    else:
        print(format_report(description))
    return 0


def run_selftest(args: argparse.Namespace) -> int:
    from . import set_num_threads
    from .selftest import report

    target = None if args.json in (None, "-") else _new_file(args.json)
    if args.threads is not None:
        set_num_threads(args.threads)
    with _progress() as step:
        result = report.examine(args.backend, quick=args.quick, bench=args.bench, step=step)
    if args.json == "-":
        _print_json(result)
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
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on a terminal."""
    from tqdm import tqdm

    with tqdm(bar_format="{elapsed} {desc}", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.set_description_str


def _compare(
    model: Model,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    options: Options,
    as_json: bool,
) -> int:
    from .ab import compare, format_comparison

    comparison = compare(model, tokens, options)
    if as_json:
        _print_json(comparison.describe() | {"text": tokenizer.decode(comparison.fused.tokens)})
    else:
        print(format_comparison(comparison))
    return 0 if comparison.bit_identical else 1


def _folder(text: str) -> Path:
    """A local checkpoint folder; where it looks like a repository's name, how to download it."""
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{text} is a file, expected the folder of a checkpoint.")
    hint = ""
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        target = text.rpartition("/")[2]
        hint = f" To download it: hf download {text} --local-dir {target}"
    raise FileNotFoundError(f"{text} does not exist; models are read from local folders.{hint}")


@contextlib.contextmanager
def _traced(
    model: Model, path: str | None, write: Callable[[str], None]
) -> Iterator[Callable[[str], None]]:
    """``write``, which also appends to the trace file, if there is to be one."""
    if path is None:
        yield write
        return
    from .replay import TraceWriter

    assert model.streaming is not None  # or --trace was refused
    with open(path, "w") as file:
        trace = TraceWriter(model.streaming, file, model.args.num_experts_per_tok)

        def both(text: str) -> None:
            trace.write()
            write(text)

        yield both
        trace.write()


def _load(
    path: Path, args: argparse.Namespace, stream: StreamOptions | None = None
) -> tuple[Model, TokenizerWrapper]:
    from . import load, set_num_threads

    if args.threads is not None:
        set_num_threads(args.threads)
    if (path / "config.json").exists() and not (path / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"{path} has no tokenizer_config.json.")
    return load(path, kv_format=args.kv_format, stream=stream)


def _read_prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(_: str) -> None:
    pass


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _print_streaming(model: Model) -> None:
    if model.streaming is None:
        return
    stats = model.streaming.stats()
    rate, nbytes = stats["hit_rate"] or 0.0, stats["bytes"]
    text = f"experts     hit rate {rate:.3f}, {nbytes / 1e9:.2f} GB read, "
    print(f"{text}{stats['wait_us'] / 1e6:.2f} s waited for", file=sys.stderr)


def _print_speeds(completion: Completion) -> None:
    c, decode = completion, completion.generation_tps
    speed = "" if decode is None else f", {decode:.1f} tok/s"
    print(
        f"prompt      {c.prompt_tokens} tokens, {c.prompt_tps:.1f} tok/s\n"
        f"generated   {len(c.tokens)} tokens{speed} ({c.path})\n"
        f"peak memory {c.peak_memory_bytes / 1e9:.2f} GB\n"
        f"cache       {c.kv_bytes / 1e6:.2f} MB in {c.kv_format} for {c.kv_tokens} tokens",
        file=sys.stderr,
    )
