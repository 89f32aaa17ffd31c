"""mlx-lm's own command line with this package's models: ``python -m glm_fused.mlx_lm server …``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from mlx_lm import cli

from ..cli import BROKEN_PIPE, INTERRUPTED
from ..cli.arguments import add_kv_format, add_streaming
from ..cli.loading import engine_options
from ..environment import flag
from ..models.prompt_memory import STEPS
from ..streaming.options import DEFAULT_CONTEXT
from .registration import UNSUPPORTED, Loading, register

PROGRAM = "python -m glm_fused.mlx_lm"
GENERATING = (
    "benchmark", "cache_prompt", "chat", "evaluate", "generate", "perplexity", "server",
)  # fmt: skip
# These commands find layers by their exact type and leave others out without a word.
REFUSALS = {"gptq": "gptq finds none of these models' layers; use convert -q or dynamic_quant"}
ERRORS = (ImportError, OSError, RuntimeError, ValueError)
# These read all weights.
READING_ALL = ("awq", "convert", "dwq", "dynamic_quant", "fuse", "gptq", "lora")


def main() -> int:
    """Run one of mlx-lm's commands and return its exit code.

    The exit code is 0 for success and 2 for an error, which is one line on stderr.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.argv[0] = PROGRAM
    if command in GENERATING or command in READING_ALL:
        sys.argv[0] += f" {command}"
    elif not command:
        print(f"usage: {PROGRAM} COMMAND [options]", file=sys.stderr)
    try:
        register()
        if command == "server":
            from .serving import limit_requests

            _end_without_model()
            limit_requests()
        with _our_options(command):
            cli.main()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return BROKEN_PIPE
    except ERRORS as error:
        if flag("GLM_FUSED_DEBUG"):
            raise
        _print_error(error)
        return 2


def _print_error(error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"glm_fused.mlx_lm: error: {text}", file=sys.stderr, flush=True)


def _end_without_model() -> None:
    """Have a server end when the model that it was started with does not load.

    It loads the model in a thread, logs a failure there, and then answers every request with an
    error.
    """
    from mlx_lm.server import ModelProvider

    stock = ModelProvider.load_default

    def load_default(provider: Any) -> None:
        try:
            stock(provider)
        except ERRORS as error:
            if flag("GLM_FUSED_DEBUG"):
                traceback.print_exc()
            _print_error(error)
            os._exit(2)  # else the main thread would go on listening

    ModelProvider.load_default = load_default  # type: ignore[method-assign]


@contextlib.contextmanager
def _our_options(command: str) -> Iterator[None]:
    """Within the block, the command's own argument parser also takes this package's options."""
    stock = argparse.ArgumentParser.parse_args

    def parse_args(
        parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None
    ) -> argparse.Namespace:
        argparse.ArgumentParser.parse_args = stock  # type: ignore[method-assign]
        if command in READING_ALL:
            _refuse_ours(command, parser)
            register(Loading(refusal=REFUSALS.get(command), only_mlx_formats=True))
        elif command in GENERATING:
            _add_ours(parser)
        parsed: argparse.Namespace = stock(parser, args, namespace)
        if command in GENERATING:
            ours = {name: parsed.__dict__.pop(name) for name in _defaults()}
            register(_loading(command, argparse.Namespace(**ours), parsed))
        return parsed

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = stock  # type: ignore[method-assign]
        register()  # models loaded after this get no options of this command


def _add_ours(parser: argparse.ArgumentParser) -> None:
    add_kv_format(parser, " of a GLM-5 model")
    add_streaming(parser)


def _defaults() -> dict[str, Any]:
    """Every option that `_add_ours` adds, by its name in a namespace, and its default."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_ours(parser)
    return vars(parser.parse_known_args([])[0])


def _given(ours: argparse.Namespace) -> list[str]:
    """The flags that were given, except those with the value of their default."""
    defaults = _defaults()
    names = (name for name, value in vars(ours).items() if value != defaults[name])
    return [f"--{name.replace('_', '-')}" for name in names]


def _refuse_ours(command: str, parser: argparse.ArgumentParser) -> None:
    scratch = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_ours(scratch)
    given = _given(scratch.parse_known_args()[0])
    if given:
        parser.error(
            f"{', '.join(given)}: {command} reads all weights and keeps no cache; these options"
            f" are for {', '.join(GENERATING)}"
        )


def _loading(command: str, ours: argparse.Namespace, parsed: argparse.Namespace) -> Loading:
    """What ``ours`` and mlx-lm's own options in ``parsed`` say about loading."""
    if ours.trace is not None:
        raise ValueError("--trace is an option of glm-fused generate only.")
    if command == "generate" and parsed.prompt_cache_file and ours.kv_format != "auto":
        raise ValueError(
            f"--kv-format {ours.kv_format}: the cache in {parsed.prompt_cache_file} keeps its own."
        )
    context = DEFAULT_CONTEXT + (getattr(parsed, "max_tokens", None) or 0)
    # These commands take mlx-lm's own step, whatever the budget, so memory is planned for that.
    step = getattr(parsed, "prefill_step_size", STEPS[0])
    planned = argparse.Namespace(**vars(ours), prefill_step_size=step)
    unsupported = {name: getattr(parsed, name, None) for name in UNSUPPORTED}
    return Loading(engine_options(planned, context), _given(ours), unsupported)


if __name__ == "__main__":
    sys.exit(main())
