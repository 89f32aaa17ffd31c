"""The ``glm-fused`` command.

Commands import what they need when they run, so that help is quick and ``doctor`` works where the
compiled extension does not load.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .generate import Completion, Options
    from .model import Model

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 plus the signal, as a shell reports it
MAX_THREADS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a failed check, 2 an error, which is one line on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return BROKEN_PIPE
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if _debugging():
            raise
        print(f"glm-fused: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _debugging() -> bool:
    from .paths import flag

    return flag("GLM_FUSED_DEBUG")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"glm-fused: error: {message}\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        parser.exit(message=f"glm-fused {metadata.version('glm-fused')}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="glm-fused", description="GLM-5 on MLX, checked bit for bit.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.set_defaults(run=_generate)
    _add_generate(generate)

    demo = commands.add_parser("demo", help="try the small checkpoint that comes with the package")
    demo.set_defaults(run=_demo)
    demo.add_argument("--prompt", metavar="TEXT", help="Python to continue; - for stdin")
    _add_length(demo, 64)

    doctor = commands.add_parser("doctor", help="check the installation and this machine")
    doctor.set_defaults(run=_doctor)

    inspect = commands.add_parser("inspect", help="say what a checkpoint is and what it costs")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("path", metavar="PATH", help="folder of a checkpoint")

    for command in (generate, demo, doctor):
        threads = _integer(1, MAX_THREADS)
        command.add_argument("--threads", type=threads, metavar="N", help="of the CPU kernels")
    for command in (generate, demo, doctor, inspect):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of a checkpoint")
    add("--prompt", required=True, metavar="TEXT", help="the prompt; - for stdin")
    _add_length(parser, 256)
    number = _number(lambda value: 0 <= value < math.inf, "a number of at least 0")
    add("--temp", type=number, default=0.0, metavar="T", help="temperature; 0 (default): greedy")
    number = _number(lambda value: 0 < value <= 1, "a number above 0, up to 1")
    add("--top-p", type=number, default=1.0, metavar="P", help="nucleus of this probability")
    add("--seed", type=_integer(0, 2**64 - 1), metavar="S", help="makes sampling reproducible")
    add("--raw", action="store_true", help="do not apply the chat template")
    add("--ab", action="store_true", help="run the fused and the reference path and compare bits")
    add("--verbose", action="store_true", help="speeds on stderr, in a pipe too")


def _add_length(parser: argparse.ArgumentParser, default: int) -> None:
    kind = _integer(1, 2**31 - 1)
    text = f"tokens to generate (default: {default})"
    parser.add_argument("--max-tokens", type=kind, default=default, metavar="N", help=text)


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}: {text!r}")
        return value

    return parse


def _number(valid: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"expected {expected}: {text!r}")
        return value

    return parse


def _generate(args: argparse.Namespace) -> int:
    from .generate import Options, encode, generate

    prompt = _read_prompt(args.prompt)
    model, tokenizer = _load(_folder(args.model), args.threads)
    tokens = encode(model, tokenizer, prompt, args.raw)
    options = Options(args.max_tokens, args.temp, args.top_p, args.seed)
    if args.ab:
        return _compare(model, tokenizer, tokens, options, args.json)
    completion = generate(model, tokenizer, tokens, options, _discard if args.json else _write)
    if args.json:
        _print_json(completion.describe())
        return 0
    print()
    if args.verbose or sys.stderr.isatty():
        _print_speeds(completion)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo
    from .generate import Options

    prompt = demo.PROMPT if args.prompt is None else _read_prompt(args.prompt)
    model, tokenizer = _load(demo.checkpoint_folder(), args.threads)
    write = _discard if args.json else _write
    options = Options(args.max_tokens, demo.TEMP, demo.TOP_P, demo.SEED)
    result = demo.run(model, tokenizer, prompt, options, write)
    if args.json:
        _print_json(result)
    return 0 if result["ab"]["bit_identical"] else 1


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    result = doctor.examine(args.threads)
    if args.json:
        _print_json(result)
    else:
        print(doctor.format_result(result))
    return 0 if result["ok"] else 1


def _inspect(args: argparse.Namespace) -> int:
    from .report import describe, format_report

    description = describe(_folder(args.path))
    if args.json:
        _print_json(description)
    else:
        print(format_report(description))
    return 0


def _compare(
    model: Model,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    options: Options,
    as_json: bool,
) -> int:
    from .generate import compare, format_comparison

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


def _load(path: Path, threads: int | None) -> tuple[Model, TokenizerWrapper]:
    from . import load, set_num_threads

    if threads is not None:
        set_num_threads(threads)
    if (path / "config.json").exists() and not (path / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"{path} has no tokenizer_config.json.")
    return load(path)


def _read_prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(_: str) -> None:
    pass


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _print_speeds(completion: Completion) -> None:
    c, decode = completion, completion.generation_tps
    speed = "" if decode is None else f", {decode:.1f} tok/s"
    print(
        f"prompt      {c.prompt_tokens} tokens, {c.prompt_tps:.1f} tok/s\n"
        f"generated   {len(c.tokens)} tokens{speed} ({c.path})\n"
        f"peak memory {c.peak_memory_bytes / 1e9:.2f} GB",
        file=sys.stderr,
    )
