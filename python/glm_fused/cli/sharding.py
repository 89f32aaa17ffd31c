"""``--shard``: one command in several processes, of which rank 0 talks."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from .arguments import UsageError, flags

if TYPE_CHECKING:
    from ..models.ranks import Ranks

TENSOR = "tensor"
PREFILL_STEP = 512  # where no option says: what fits in memory may differ between machines
_OWN = ("model", "threads", "parser", "root", "run", "shard")  # may differ between ranks
_ALONE = (
    "ab", "memory_budget", "slots", "sidecar", "trace",
)  # fmt: skip


def add_shard(parser: argparse.ArgumentParser) -> None:
    """Add --shard."""
    help = (
        "share the model with the other processes that mlx.launch started: each has rows of its"
        "\nmatrices, and the text is that of one process"
    )
    parser.add_argument("--shard", choices=(TENSOR,), help=help)


@contextlib.contextmanager
def shared(options: argparse.Namespace, prompt: str) -> Iterator[Ranks | None]:
    """The ranks that share the model, which have agreed on everything; None without --shard.

    Other ranks than 0 write nothing to stdout. If one of them fails, dies or hangs within the
    block, so do all.
    """
    if options.shard is None:
        yield None
        return
    if alone := [name for name in _ALONE if getattr(options, name) not in (None, False)]:
        raise UsageError(f"{flags(alone)}: not with --shard.")
    from ..models.ranks import Ranks
    from ..parallel.agreement import agree, join_group, tell
    from ..parallel.interrupts import on_interrupt
    from ..parallel.watch import Watch

    group = join_group()
    if options.prefill_step_size is None:
        options.prefill_step_size = PREFILL_STEP
    with _talking(group.rank()), Watch(group) as watch, on_interrupt(watch.interrupt):
        agree(group, _described(options, prompt))
        if options.seed is None:
            options.seed = int(tell(group, str(secrets.randbits(64)))[0])
        options.verbose = options.verbose and group.rank() == 0
        yield Ranks(group)


def _described(options: argparse.Namespace, prompt: str) -> dict[str, object]:
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub import local_model
    from ..checkpoint.identity import checkpoint_id
    from ..checkpoint.paths import checkpoint_path

    path = checkpoint_path(local_model(options.model))
    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    return {
        "the version of glm-fused": metadata.version("glm-fused"),
        "the version of mlx": metadata.version("mlx"),
        "the checkpoint": checkpoint_id(Checkpoint.open(path)),
        **{flags([name]): value for name, value in given.items() if name != "prompt"},
        "the prompt": prompt,
    }


@contextlib.contextmanager
def _talking(rank: int) -> Iterator[None]:
    """Keep all ranks but the first from writing to stdout."""
    if rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
