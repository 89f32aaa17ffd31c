"""``glm-fused serve``: a model behind the APIs of OpenAI and Anthropic."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments
from .arguments import MODEL, UsageError, parsed_size
from .loading import engine_options, open_engine
from .sharding import add_shard, met, show_plan, standing

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine_options import EngineOptions
    from ..models.line import Line
    from ..models.ranks import Ranks
    from ..parallel.watch import Watch
    from ..serve.service import Service
    from ..serve.settings import Settings

HELP = "serve a model over HTTP, as OpenAI's and Anthropic's APIs"
KEY = "GLM_FUSED_API_KEY"
CONTEXT = 32_768  # tokens to plan memory for, where experts are streamed
PROMPT_CACHE = "1GiB"
_SAME = (  # options that are settings
    "host", "port", "max_batch", "max_queue", "max_tokens", "timeout", "time_limit", "grace",
)  # fmt: skip
EXAMPLES = """\
examples:
  glm-fused serve --model PATH                       # http://127.0.0.1:8080/v1 for OpenAI's clients
  glm-fused serve --model PATH --host 0.0.0.0 --api-key-file key.txt
  glm-fused serve --model PATH --memory-budget 24GB --context 16384 --max-batch 4
  glm-fused serve --model demo --port 9000 --name gpt-4o --verbose
  mlx.launch --hosts HOST1,HOST2 glm-fused serve --model PATH --shard tensor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=arguments.path, metavar="PATH", help=MODEL)
    help = "what requests call the model (may be given more than once; default: the last part of"
    help += " PATH, or of the Hub's model NAME and ORG/NAME)"
    add("--name", type=arguments.words, action="append", metavar="NAME", help=help)
    help = "of an answer whose request does not say (default: as many as the context has room for)"
    add("--max-tokens", type=arguments.integer(1, 2**31 - 1), metavar="N", help=help)
    add("--verbose", action="store_true", help="a line for every request, in a pipe too")
    add("--json", action="store_true", help="log on stderr as JSON, a line for every request")
    _add_access(parser)
    _add_limits(parser)
    _add_prompt_cache(parser)
    arguments.add_drafts(parser)
    arguments.add_streaming(parser, trace=False)
    arguments.add_kv_format(parser)
    arguments.add_prefill_step(parser)
    add_shard(parser)
    arguments.add_threads(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    text = "only this machine can connect unless --host says otherwise, which needs a key"
    add = parser.add_argument_group("access", text).add_argument
    help = "address to listen on (default: 127.0.0.1); 0.0.0.0 or :: for all"
    add("--host", type=arguments.words, metavar="ADDRESS", help=help)
    kind = arguments.integer(0, 65_535)
    add("--port", type=kind, metavar="N", help="(default: 8080); 0: any that is free")
    help = f"what clients have to know (default: {KEY} in the environment); others can read it"
    add("--api-key", metavar="KEY", help=f"{help} in the list of processes")
    add("--api-key-file", type=arguments.path, metavar="FILE", help="a file with nothing but it")
    add("--no-api-key", action="store_true", help="let everybody in who can connect")
    help = "a further name in the URLs of clients (may be given more than once)"
    add("--allowed-host", type=arguments.words, action="append", metavar="NAME", help=help)
    help = "let pages of https://a.example, say, use the server; * for all"
    add("--cors-origin", type=arguments.words, action="append", metavar="ORIGIN", help=help)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    positive = arguments.number(lambda value: 0 < value <= 10**6, "a number of seconds above 0")
    help = "requests to generate for at a time (default: 16)"
    add("--max-batch", type=arguments.integer(1, 16), metavar="N", help=help)
    help = "requests that may wait (default: 256)"
    add("--max-queue", type=arguments.integer(1, 100_000), metavar="N", help=help)
    add("--max-body", metavar="SIZE", help="the largest body of a request (default: 16MiB)")
    help = "for a client to send its request, or to read nothing (default: 60)"
    add("--timeout", type=positive, metavar="SECONDS", help=help)
    help = "for all of a request (default: 3600)"
    add("--time-limit", type=positive, metavar="SECONDS", help=help)
    help = "for running requests to end when the server is told to (default: 10)"
    add("--grace", type=arguments.integer(0, 86_400), metavar="SECONDS", help=help)


def _add_prompt_cache(parser: argparse.ArgumentParser) -> None:
    text = "a request that begins as one before it takes only its new tokens"
    add = parser.add_argument_group("caches of earlier requests", text).add_argument
    help = f"memory for them, which a memory budget counts (default: {PROMPT_CACHE}); 0: keep none"
    add("--prompt-cache", metavar="SIZE", default=PROMPT_CACHE, help=help)
    help = "keep them here, too, where they outlast the server"
    add("--prompt-cache-dir", type=arguments.path, metavar="DIR", help=help)


def run(options: argparse.Namespace) -> int:
    if options.prompt_cache_dir is not None and options.prompt_cache == "0":
        raise UsageError("--prompt-cache-dir needs a --prompt-cache above 0.")
    if options.shard is None:
        _lead(options, None, None)
        return 0
    with met(options, {}) as (group, watch), standing(options, group) as ranks:
        if ranks.rank == 0:
            _lead(options, ranks, watch)
        else:
            _follow(options, ranks, watch)
    return 0


def _lead(options: argparse.Namespace, ranks: Ranks | Line | None, watch: Watch | None) -> None:
    """Serve, in the one process that clients know."""
    settings = _settings(options)
    _check_libraries()
    from ..serve.log import set_up
    from ..serve.server import bind

    set_up(options.json, options.verbose or sys.stderr.isatty())
    loading = _loading(options, ranks)
    with bind(settings) as sock, open_engine(options.model, options.threads, loading) as engine:
        show_plan(engine, CONTEXT)
        if watch is not None:
            watch.wait_for_all()
        _serve(engine, settings, sock, watch)


def _follow(options: argparse.Namespace, ranks: Ranks | Line, watch: Watch) -> None:
    """Do what rank 0 does with the model, until it ends; signals are rank 0's to answer."""
    from ..generation.batching.leading import follow

    loading = _loading(options, ranks)
    with open_engine(options.model, options.threads, loading) as engine:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        show_plan(engine, CONTEXT)
        watch.wait_for_all()
        store = engine.prompt_store() if engine.options.prompt_cache_bytes else None
        follow(engine.model, engine.tokenizer, engine.drafts, store, watch.hear)


def _loading(options: argparse.Namespace, ranks: Ranks | Line | None) -> EngineOptions:
    size = options.prompt_cache
    memory = None if size == "0" else parsed_size("--prompt-cache", size)
    return replace(engine_options(options, CONTEXT, ranks), prompt_cache=memory)


def _serve(engine: Engine, settings: Settings, sock: Any, watch: Watch | None) -> None:
    from ..serve.app import create_app
    from ..serve.server import Server, url

    app = create_app(engine, settings, watch)
    names = ", ".join(settings.names)
    key = "with its key" if settings.api_key else "without a key"

    def announce() -> None:
        if watch is not None:
            loop = asyncio.get_running_loop()
            watch.before_end = lambda: _end_requests(loop, app.state.service)
        print(f"{names}: {url(sock)}/v1 ({key}; Ctrl-C ends it)", flush=True)

    try:
        Server(app, settings, announce).run(sockets=[sock])
    finally:
        app.state.service.close()


def _end_requests(loop: asyncio.AbstractEventLoop, service: Service) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: there are none
        loop.call_soon_threadsafe(service.end)


def _settings(options: argparse.Namespace) -> Settings:
    """The settings of a command line. Raises UsageError for options that do not fit together."""
    from ..serve.settings import Settings

    found = {name: getattr(options, name) for name in _SAME}
    given = {name: value for name, value in found.items() if value is not None}
    if options.max_body is not None:
        given["max_body_bytes"] = parsed_size("--max-body", options.max_body)
    settings = Settings(
        names=_names(options),
        api_key=_key(options),
        prompt_cache_dir=options.prompt_cache_dir,
        allowed_hosts=tuple(options.allowed_host or ()),
        cors_origins=tuple(options.cors_origin or ()),
        **given,
    )
    if not settings.local and settings.api_key is None and not options.no_api_key:
        raise UsageError(
            f"--host {settings.host}: others can connect, so it needs --api-key-file or --api-key;"
            " or --no-api-key, which lets everybody in."
        )
    return settings


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    """What clients may call the model."""
    from ..checkpoint.hub_names import hub_name

    if options.name:
        return tuple(options.name)
    if (found := hub_name(options.model)) is not None:  # whatever its revision and variant
        return found.repository.partition("/")[2], found.repository
    return (Path(options.model).resolve().name,)


def _key(options: argparse.Namespace) -> str | None:
    ways = ("api_key", "api_key_file", "no_api_key")
    given = [name for name in ways if getattr(options, name)]
    if len(given) > 1:
        raise UsageError(f"{arguments.flags(given)}: expected one of them.")
    if options.no_api_key:
        return None
    if options.api_key_file is not None:
        return Path(options.api_key_file).expanduser().read_text(encoding="utf-8").strip()
    return options.api_key if options.api_key is not None else os.environ.get(KEY) or None


def _check_libraries() -> None:
    """Raise ImportError, saying what to install, where a library of the server is missing."""
    from importlib.util import find_spec

    needed = ("starlette", "uvicorn", "pydantic", "prometheus_client", "openai", "anthropic")
    missing = [name for name in (*needed, "llguidance") if find_spec(name) is None]
    if missing:
        what = ", ".join(missing)
        raise ImportError(f"serve needs {what}: pip install 'glm-fused[serve]'.")
