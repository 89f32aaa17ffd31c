"""Processes prompts with whole models: the bundled one, or a slice of GLM-5.2.

    python bench/bench_prompt.py                                     # the bundled model
    python bench/bench_prompt.py --base OTHER_VENV/bin/python        # beside another version
    python bench/bench_prompt.py --llama FOLDER --gguf FILE          # and peers/llama_gguf.py
    python bench/bench_prompt.py --stock --prompts 512 --repeats 1   # beside stock mlx-lm
    python bench/bench_prompt.py --slice --repeats 1 --prompts 512   # true shapes, 6 GiB

Everything that is measured takes turns, prompt by prompt, in the processes of bench_decode.py. For
each length and number of threads it prints medians over the prompts: tokens/s, ms a token, the
whole, the fastest, and how many times as long as ours it took. A prompt is random tokens in chunks
of 2048, up to the logits of its last token. llama.cpp's own llama-bench does the same; its weights
are Q6_K with experts in Q4_0, and it multiplies them by activations that it has quantized to 8
bits. What --slice and --stock take is said in bench_decode.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_decode import OURS, Contender, LlamaBench, Worker
from common import median, report
from peers.full_layers import write_full_layers

COLUMNS = {
    "model": "",
    "prompt": "d",
    "threads": "d",
    "tokens/s": ".0f",
    "ms/token": ".3f",
    "ms": ".1f",
    "best ms": ".1f",
    "x ours": ".2f",
}


class LlamaPrompts(LlamaBench):
    """llama.cpp's own benchmark of prompts."""

    def sizes(self, tokens: int) -> list[str]:
        return ["-p", str(tokens), "-n", "0"]


def start(options: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """What is measured, by name, ours first; a model that is made for it goes into ``folder``."""
    script, model = "decode_worker.py", ["--prompts"]
    if options.slice:
        model += ["--slice", "--experts", str(options.experts)]
    if options.stock:
        write_full_layers(folder / "full_layers")
        model += ["--model", str(folder / "full_layers")]
    contenders: dict[str, Contender] = {OURS: Worker(sys.executable, script, *model)}
    if options.base:
        contenders["base"] = Worker(options.base, script, *model)
    if options.stock:
        contenders["mlx-lm"] = Worker(sys.executable, script, *model, "--stock")
    if options.llama:
        contenders["llama.cpp"] = LlamaPrompts(options.llama, options.gguf)
    return contenders


def measure(
    contenders: Mapping[str, Contender], prompt: int, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each contender; the first one is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            took = contender(threads, prompt).seconds
            if turn:  # the first turn warms up
                seconds[name].append(took)
    rows = []
    for name, taken in seconds.items():
        took = median(taken)
        ratios = [theirs / our for theirs, our in zip(taken, seconds[OURS], strict=True)]
        rows.append(
            {
                "model": name,
                "prompt": prompt,
                "threads": threads,
                "tokens/s": prompt / took,
                "ms/token": 1e3 * took / prompt,
                "ms": 1e3 * took,
                "best ms": 1e3 * min(taken),
                "x ours": median(ratios),
                "of": contenders[name].loaded,
            }
        )
    return rows


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--prompts", type=int, nargs="+", default=[512, 2048, 8192], help="their lengths")
    add("--threads", type=int, nargs="+", default=[2])
    add("--repeats", type=int, default=5, help="timed prompts; medians are printed")
    add("--slice", action="store_true", help="layers of GLM-5.2's shapes, not the bundled model")
    add("--experts", type=int, default=64, help="of a sparse layer of the slice")
    add("--base", metavar="PYTHON", help="of an environment with another version of glm_fused")
    add("--stock", action="store_true", help="beside stock mlx-lm, on a model that it can load")
    add("--llama", type=Path, metavar="FOLDER", help="in which llama.cpp was built")
    add("--gguf", type=Path, metavar="FILE", help="for --llama, of peers/llama_gguf.py")
    add("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if (options.llama is None) != (options.gguf is None):
        parser.error("--llama and --gguf need one another.")
    if options.slice and (options.stock or options.llama):
        parser.error("--slice takes another model than --stock and --llama.")
    return options


def main() -> None:
    options = parse()
    with TemporaryDirectory() as name:
        contenders = start(options, Path(name))
        rows = [
            row
            for threads in options.threads
            for prompt in options.prompts
            for row in measure(contenders, prompt, threads, options.repeats)
        ]
        for contender in contenders.values():
            contender.close()
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
