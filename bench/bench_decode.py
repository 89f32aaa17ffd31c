"""Decodes whole models, token by token: the bundled one, or a slice of GLM-5.2.

    python bench/bench_decode.py                                     # the bundled model
    python bench/bench_decode.py --base OTHER_VENV/bin/python        # beside another version
    python bench/bench_decode.py --llama FOLDER --gguf FILE          # and peers/llama_gguf.py
    python bench/bench_decode.py --transformers OTHER_VENV/bin/python
    python bench/bench_decode.py --stock --repeats 3 --tokens 32     # beside stock mlx-lm
    python bench/bench_decode.py --slice --threads 2 --repeats 3     # true shapes, 6 GiB

A burst is 128 greedy tokens after a prompt of 86, decoded as generation does it: a token's graph is
built and enqueued while the token before is computed. Everything that is measured takes turns,
burst by burst, in processes that live as long as the bench. For each number of threads it prints
medians over the bursts: tokens/s; ms a token; the ms in which Python built its graph; the share of
the time in which the kernels of a recorded step ran; the fastest burst; GB/s of weights
read, the plain streaming read bandwidth measured before and after each burst, and the fraction of
it (of no meaning where the weights fit a cache, as the bundled model's may); and how many times as
long as ours a burst took. The slice has embedding, head, one dense layer and three sparse ones of
GLM-5.2's shapes, affine4 but for routers and indexer, with 64 experts a layer instead of 256, of
which a token takes 8 (glm52_slice.py). Stock mlx-lm, whose CPU ops have one thread, decodes the
bundled model with an indexer on every layer (peers/full_layers.py), as then do the others.

llama.cpp decodes as its own llama-bench times it: so many random tokens, which it does not choose.
Each of its bursts is a new process. Its weights are Q6_K with experts in Q4_0, and it multiplies
them by activations that it has quantized to 8 bits. transformers has the weights as bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import glm52_slice
import mlx.core as mx
from common import median, report
from peers.full_layers import write_full_layers
from peers.release import write_release

import glm_fused
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.selftest.benchmark import read_bandwidth

OURS = "ours"
YARDSTICK_BYTES = 512 << 20
COLUMNS = {
    "model": "",
    "threads": "d",
    "tokens/s": ".1f",
    "ms": ".3f",
    "graph ms": ".3f",
    "kernels": ".2f",
    "best ms": ".3f",
    "GB/s": ".2f",
    "read GB/s": ".2f",
    "fraction": ".2f",
    "x ours": ".2f",
}


class Burst(NamedTuple):
    """The seconds of a burst; of these those of building graphs and of recorded steps, if known."""

    seconds: float
    graph_seconds: float | None = None
    kernel_seconds: float | None = None


class Worker:
    """A process that decodes on request; bursts.py says how it is asked."""

    def __init__(
        self,
        python: str,
        script: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [python, str(Path(__file__).parent / script), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    @functools.cached_property
    def loaded(self) -> dict[str, Any]:
        """What it said of the model, once it was loaded."""
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended, status {self.process.wait()}.")
        return json.loads(line)

    def ask(self, threads: int, tokens: int) -> None:
        """Have it begin a burst; `answer` has what it took."""
        assert self.process.stdin is not None and self.loaded
        request = {"threads": threads, "tokens": tokens}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def __call__(self, threads: int, tokens: int) -> Burst:
        self.ask(threads, tokens)
        return Burst(**self.answer())

    def close(self) -> None:
        self.process.communicate()


class LlamaBench:
    """llama.cpp's own benchmark on a GGUF file; each burst starts it anew."""

    def __init__(self, build: Path, gguf: Path, *arguments: str) -> None:
        program = next((path for path in build.rglob("llama-bench") if path.is_file()), None)
        if program is None:
            raise SystemExit(f"{build} does not hold llama-bench.")
        self.command = [str(program), "-m", str(gguf), "-o", "json", "-r", "1", *arguments]
        self.loaded: dict[str, Any] = {"model": gguf.name}

    def sizes(self, tokens: int) -> list[str]:
        """The options for a burst of so many tokens."""
        return ["-p", "0", "-n", str(tokens)]

    def __call__(self, threads: int, tokens: int) -> Burst:
        command = [*self.command, *self.sizes(tokens), "-t", str(threads)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"llama-bench: {run.stderr.strip()[-400:]}")
        (row,) = json.loads(run.stdout)
        self.loaded["build_commit"] = row["build_commit"]
        return Burst(row["samples_ns"][0] / 1e9)

    def close(self) -> None:
        """Nothing of it is left running."""


Contender = Worker | LlamaBench


class Samples:
    """The bursts of one contender with one number of threads, and the read bandwidths around."""

    def __init__(self) -> None:
        self.bursts: list[Burst] = []
        self.bandwidths: list[float] = []

    def take(self, contender: Contender, threads: int, tokens: int, yardstick: mx.array) -> None:
        glm_fused.set_num_threads(threads)
        before = read_bandwidth(yardstick)
        self.bursts.append(contender(threads, tokens))
        self.bandwidths.append((before + read_bandwidth(yardstick)) / 2)

    def row(self, tokens: int, weights: int | None, ours: Samples) -> dict[str, Any]:
        """What is printed; ``weights`` are the bytes that a token reads, where they are known."""
        seconds = [burst.seconds / tokens for burst in self.bursts]
        found = {
            "tokens/s": 1 / median(seconds),
            "ms": 1e3 * median(seconds),
            "best ms": 1e3 * min(seconds),
            "read GB/s": median(self.bandwidths),
        }
        if all(burst.graph_seconds is not None for burst in self.bursts):
            graph = [(burst.graph_seconds or 0) / tokens for burst in self.bursts]
            found["graph ms"] = 1e3 * median(graph)
        if all(burst.kernel_seconds is not None for burst in self.bursts):
            shares = [(burst.kernel_seconds or 0) / burst.seconds for burst in self.bursts]
            found["kernels"] = median(shares)
        if weights is not None:
            rates = [weights / took / 1e9 for took in seconds]
            found["GB/s"] = median(rates)
            pairs = zip(rates, self.bandwidths, strict=True)
            found["fraction"] = median([rate / bandwidth for rate, bandwidth in pairs])
        both = zip(self.bursts, ours.bursts, strict=True)
        found["x ours"] = median([theirs.seconds / our.seconds for theirs, our in both])
        return found


def measure(
    contenders: Mapping[str, Contender], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender and number of threads; the first contender is ours."""
    yardstick = mx.zeros((YARDSTICK_BYTES // 4,), mx.uint32)
    mx.eval(yardstick)
    samples = {(name, threads): Samples() for threads in options.threads for name in contenders}
    for turn in range(options.repeats + 1):
        for (name, threads), sample in samples.items():
            if turn == 0:  # warms up
                contenders[name](threads, options.tokens)
            else:
                sample.take(contenders[name], threads, options.tokens, yardstick)
    rows = []
    for (name, threads), sample in samples.items():
        weights = contenders[name].loaded.get("bytes_per_token")
        row = sample.row(options.tokens, weights, samples[OURS, threads])
        rows.append({"model": name, "threads": threads} | row | {"of": contenders[name].loaded})
    return rows


def at_their_best(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each contender beside ours, each at the number of threads that suits it best."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["model"] not in best or row["ms"] < best[row["model"]]["ms"]:
            best[row["model"]] = row
    ours = best.pop(OURS)
    return [
        f"{name} takes {row['ms'] / ours['ms']:.2f} times as long as ours, each at its best number"
        f" of threads ({row['threads']} and {ours['threads']})"
        for name, row in best.items()
    ]


def start(options: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """What is measured, by name, ours first; models that are made for it go into ``folder``."""
    here, script = sys.executable, "decode_worker.py"
    prompt = ["--prompt", str(options.prompt)]
    model = [*prompt, "--model", str(bundled_folder())]
    if options.slice:
        model = [*prompt, "--slice", "--experts", str(options.experts)]
    if options.stock:
        model = [*prompt, "--model", str(folder / "full_layers")]
        write_full_layers(folder / "full_layers")
    contenders: dict[str, Contender] = {OURS: Worker(here, script, *model)}
    if options.base:
        contenders["base"] = Worker(options.base, script, *model)
    if options.stock:
        contenders["mlx-lm"] = Worker(here, script, *model, "--stock")
    if options.transformers:
        script, released = "peers/transformers_worker.py", folder / "release"
        released.mkdir()
        write_release(released)
        model = [*prompt, "--model", str(released)]
        contenders["transformers"] = Worker(options.transformers, script, *model)
    if options.llama:
        depth = ["-d", str(options.prompt)]
        contenders["llama.cpp"] = LlamaBench(options.llama, options.gguf, *depth)
    return contenders


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--repeats", type=int, default=9, help="timed bursts; medians are printed")
    add("--tokens", type=int, default=128, help="of a burst")
    add("--prompt", type=int, default=86, help="tokens before a burst")
    add("--slice", action="store_true", help="layers of GLM-5.2's shapes, not the bundled model")
    glm52_slice.add_options(parser)
    add("--base", metavar="PYTHON", help="of an environment with another version of glm_fused")
    add("--stock", action="store_true", help="beside stock mlx-lm, on a model that it can load")
    add("--transformers", metavar="PYTHON", help="of an environment with torch and transformers")
    add("--llama", type=Path, metavar="FOLDER", help="in which llama.cpp was built")
    add(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="for --llama, of peers/llama_gguf.py",
    )
    add("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if (options.llama is None) != (options.gguf is None):
        parser.error("--llama and --gguf need one another.")
    others = options.llama is not None or options.transformers is not None
    if others + options.slice + options.stock > 1:
        parser.error("--slice and --stock take another model than --llama and --transformers.")
    return options


def main() -> None:
    options = parse()
    mx.set_default_device(mx.cpu)
    with TemporaryDirectory() as name:
        contenders = start(options, Path(name))
        rows = measure(contenders, options)
        for contender in contenders.values():
            contender.close()
    report(rows, COLUMNS, options.json)
    if not options.json:
        print("".join(f"{line}\n" for line in at_their_best(rows)), end="")


if __name__ == "__main__":
    main()
