"""Decodes with processes that share a model, beside one process with as many threads.

    python bench/bench_shards.py                                      # the bundled model
    python bench/bench_shards.py --slice --tokens 16                  # true shapes, 1 GiB
    python bench/bench_shards.py --ranks 2 4 --repeats 9 --json

The processes are ranks of MLX's ring on this machine's loopback and have one thread each. They take
turns with the single process, burst by burst, as bench_decode.py has them: 128 greedy tokens after
a prompt of 86. It prints medians over the bursts: tokens/s; ms a token; of these, those that were
spent in gathers; how many gathers a token has, and the KiB that each process then has of them; and
tokens/s as a part of the single process'.

The time in gathers is what a burst of the first process takes longer than one in which what it
computed itself stands for what the others did: what messages take, and what it waits for others.
The slice has embedding, head, one dense layer and two sparse ones of GLM-5.2's shapes in affine4
(glm52_slice.py).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import glm52_slice
from bench_decode import Worker
from common import median, report
from glm52_slice import Slice

from glm_fused.checkpoint.paths import bundled_folder

SCRIPT = "shard_worker.py"
SLICE = Slice(layers=3, experts=16, vocabulary=4096)
COLUMNS = {
    "processes": "d",
    "threads": "d",
    "tokens/s": ".1f",
    "ms": ".3f",
    "ms in gathers": ".3f",
    "gathers": ".0f",
    "KiB gathered": ".1f",
    "of one": ".2f",
}


class Shared:
    """Processes that share a model; each has one thread."""

    def __init__(self, ranks: int, folder: Path, *arguments: str) -> None:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(ranks)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            hosts = [["{}:{}".format(*each.getsockname())] for each in sockets]
        file = folder / f"{ranks}.json"
        file.write_text(json.dumps(hosts))
        self.workers = [
            Worker(
                sys.executable,
                SCRIPT,
                "--shard",
                *arguments,
                environment=os.environ | {"MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]

    def burst(self, tokens: int) -> dict[str, Any]:
        """What the first of them says of a burst."""
        for worker in self.workers:
            worker.ask(1, tokens)
        first, *_ = [worker.answer() for worker in self.workers]
        return first

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def measure(one: Worker, shared: Shared, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for the single process, and one for those that share the model."""
    ranks = len(shared.workers)
    bursts: list[tuple[float, dict[str, Any]]] = []
    for turn in range(repeats + 1):
        burst = one(ranks, tokens).seconds, shared.burst(tokens)
        if turn:  # the first warms up
            bursts.append(burst)
    alone = median([seconds for seconds, _ in bursts]) / tokens
    together = median([found["seconds"] for _, found in bursts]) / tokens
    waits = [found["seconds"] - found["alone_seconds"] for _, found in bursts]
    last = bursts[-1][1]
    row = {
        "processes": ranks,
        "threads": 1,
        "tokens/s": 1 / together,
        "ms": 1e3 * together,
        "ms in gathers": 1e3 * median(waits) / tokens,
        "gathers": last["gathers"],
        "KiB gathered": last["gathered_bytes"] / 1024,
        "of one": median([seconds / found["seconds"] for seconds, found in bursts]),
        "of": [worker.loaded for worker in shared.workers],
    }
    single = {"processes": 1, "threads": ranks, "tokens/s": 1 / alone, "ms": 1e3 * alone}
    return [single | {"of": [one.loaded]}, row]


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2], help="how many processes share the model")
    add("--repeats", type=int, default=5, help="timed bursts; medians are printed")
    add("--tokens", type=int, default=128, help="of a burst")
    add("--prompt", type=int, default=86, help="tokens before a burst")
    add("--slice", action="store_true", help="layers of GLM-5.2's shapes, not the bundled model")
    add("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def main() -> None:
    options, rows = parse(), []
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = folder if options.slice else bundled_folder()
        if options.slice:
            glm52_slice.write(SLICE, "affine4", folder)
        arguments = "--model", str(model), "--prompt", str(options.prompt)
        one = Worker(sys.executable, SCRIPT, *arguments)
        for ranks in options.ranks:
            shared = Shared(ranks, folder, *arguments)
            rows += measure(one, shared, options.tokens, options.repeats)
            shared.close()
        one.close()
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
