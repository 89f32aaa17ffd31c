"""``--shard``: one command in several processes, of which rank 0 talks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import UsageError, flags

if TYPE_CHECKING:
    import mlx.core as mx

    from ..checkpoint.folder import Checkpoint
    from ..engine import Engine
    from ..models.line import Line
    from ..models.ranks import Ranks
    from ..parallel.watch import Watch

TENSOR, PIPELINE, AUTO = "tensor", "pipeline", "auto"
CONTEXT = 16384  # tokens cached, as a plan of machines has them
_OWN = (  # may differ between ranks; of the prompt the text is compared
    "model", "threads", "parser", "root", "run", "prompt", "host", "port", "api_key",
    "api_key_file", "no_api_key", "allowed_host", "cors_origin",
    "memory_budget", "slots", "sidecar", "direct_io", "read_depth", "read_split",
)  # fmt: skip
_ALONE = {  # not with --shard, and why
    "ab": "it compares what one process computes",
    "trace": "it has the requests of one process",
    "prompt_cache_dir": "each rank has caches of its own",
}


def add_shard(parser: argparse.ArgumentParser) -> None:
    """Add --shard."""
    help = (
        "share the model with the other processes that mlx.launch started: each has rows of its"
        "\nmatrices (tensor), some of its layers (pipeline), or whichever is quicker over the link"
        "\nbetween them, which is measured (auto); the text is that of one process"
    )
    parser.add_argument("--shard", choices=(TENSOR, PIPELINE, AUTO), help=help)


@contextlib.contextmanager
def shared(options: argparse.Namespace, prompt: str) -> Iterator[Ranks | Line | None]:
    """The ranks that share the model, which have agreed on everything; None without --shard.

    Other ranks than 0 write nothing to stdout. If one of them fails, dies or hangs within the
    block, so do all.
    """
    if options.shard is None:
        yield None
        return
    from ..parallel.agreement import tell
    from ..parallel.interrupts import on_interrupt

    with met(options, {"the prompt": prompt}) as (group, watch), on_interrupt(watch.interrupt):
        if options.seed is None:
            options.seed = int(tell(group, str(secrets.randbits(64)))[0])
        options.measures_gathers = options.json or options.verbose
        options.verbose = options.verbose and group.rank() == 0
        with standing(options, group) as ranks:
            yield ranks


@contextlib.contextmanager
def standing(options: argparse.Namespace, group: mx.distributed.Group) -> Iterator[Ranks | Line]:
    """The ranks of a group as ``--shard`` has them stand: side by side, or in a line."""
    from ..models.line import Line
    from ..models.ranks import Ranks

    if options.shard == AUTO:
        options.shard = _chosen(options, group)
    if options.shard == TENSOR:
        yield Ranks(group)
        return
    yield (line := Line(group))
    line.finish()


def _chosen(options: argparse.Namespace, group: mx.distributed.Group) -> str:
    """How a group best shares the model, of which rank 0 decides; all have to call it."""
    if alone := _for_layers(options):
        if group.rank() == 0:
            print(f"--shard {PIPELINE}: {flags(alone)} not with {TENSOR}", file=sys.stderr)
        return PIPELINE
    from ..measuring.cluster import Link, Machine
    from ..measuring.disk import read_rate
    from ..measuring.fit import memory_rate
    from ..measuring.links import measure_links
    from ..measuring.placement import plan_shards
    from ..memory import machine_bytes
    from ..parallel.agreement import tell

    checkpoint, here = _opened(options), [machine_bytes(), round(memory_rate())]
    if _streams(options):
        largest = max(checkpoint.files, key=lambda file: checkpoint.files[file])
        here.append(round(read_rate(checkpoint.folder / largest)))
    machines = [Machine(*json.loads(text)) for text in tell(group, json.dumps(here))]
    link = Link(**measure_links(group)["link"])
    shard = ""
    if group.rank() == 0:
        found = plan_shards(checkpoint, machines, link, CONTEXT, options.kv_format)
        shard = found["shard"]
        print(f"--shard {shard}: {found['reason']}", file=sys.stderr)
    return tell(group, shard)[0]


def _for_layers(options: argparse.Namespace) -> list[str]:
    """The options given that rows do not have: a sidecar with checksums of whole experts."""
    from ..streaming.flashmoe import is_flashmoe

    found = options.sidecar
    return [] if found is None or is_flashmoe(Path(found)) else ["sidecar"]


def _opened(options: argparse.Namespace) -> Checkpoint:
    """The checkpoint, with the experts that a sidecar alone has."""
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub import local_model
    from ..checkpoint.paths import checkpoint_path
    from ..streaming.flashmoe import with_experts

    checkpoint = Checkpoint.open(checkpoint_path(local_model(options.model)))
    sidecar = options.sidecar
    return checkpoint if sidecar is None else with_experts(checkpoint, Path(sidecar))


def _streams(options: argparse.Namespace) -> bool:
    """Whether experts are to be streamed."""
    from ..engine_options import STARTING

    return any(getattr(options, name) for name in STARTING)


def measured_gathers(options: argparse.Namespace, engine: Engine) -> dict[str, Any] | None:
    """What gathers cost, if ranks share the engine's model and --json or --verbose asks for it.

    All ranks have to call it.
    """
    ranks = engine.model.ranks
    if ranks is None or not options.measures_gathers:
        return None
    from ..measuring.gathers import measure_gathers

    return measure_gathers(engine.model, ranks)


def show_plan(engine: Engine, context: int) -> dict[str, Any]:
    """Say on stderr what memory is for, of texts of so many tokens, where it was shared out.

    Returns what each rank holds, for JSON, if ranks share the engine's model: all have to call it,
    and rank 0 says it of all.
    """
    ranks = engine.options.ranks
    if ranks is None:
        if engine.streaming is not None:
            print(engine.streaming.plan.format(), file=sys.stderr)
        return {}
    from ..measuring.rank_plan import format_ranks, plans_of_ranks

    plans = plans_of_ranks(engine.model, ranks, min(context, engine.context))
    if ranks.rank == 0:
        print(format_ranks(plans), file=sys.stderr)
    return {"ranks": plans}


@contextlib.contextmanager
def met(
    options: argparse.Namespace, besides: Mapping[str, object]
) -> Iterator[tuple[mx.distributed.Group, Watch]]:
    """The group of all ranks, which have agreed on options and on what is ``besides``.

    Other ranks than 0 write nothing to stdout, and all end within the block if one does.
    """
    for name, reason in _ALONE.items():
        if getattr(options, name, None) not in (None, False):
            raise UsageError(f"{flags([name])}: not with --shard, as {reason}.")
    if options.shard == TENSOR and (alone := _for_layers(options)):
        reason = "its checksums are of whole experts, of which a rank reads a part"
        raise UsageError(f"{flags(alone)}: not with --shard {TENSOR}, as {reason}.")
    from ..models.prompt_memory import SHARED_STEP
    from ..parallel.agreement import agree, join_group
    from ..parallel.watch import Watch

    group = join_group()
    if options.prefill_step_size is None:
        options.prefill_step_size = SHARED_STEP
    with talking(group.rank()), Watch(group) as watch:
        agree(group, {**_described(options), **besides})
        yield group, watch


def _described(options: argparse.Namespace) -> dict[str, object]:
    from ..checkpoint.identity import checkpoint_id

    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    return {
        "the version of glm-fused": metadata.version("glm-fused"),
        "the version of mlx": metadata.version("mlx"),
        "the checkpoint": checkpoint_id(_opened(options)),
        **{flags([name]): value for name, value in given.items()},
        "whether experts are streamed": _streams(options),
        "whether experts are in a sidecar with checksums": bool(_for_layers(options)),
    }


@contextlib.contextmanager
def talking(rank: int) -> Iterator[None]:
    """Keep all ranks but the first from writing to stdout."""
    if rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
