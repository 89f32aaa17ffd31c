"""Processes prompts with whole models: the bundled one, or a slice of GLM-5.2.

    python bench/bench_prompt.py                                     # the bundled model
    python bench/bench_prompt.py --base OTHER_VENV/bin/python        # beside another version
    python bench/bench_prompt.py --llama FOLDER --gguf FILE          # and peers/llama_gguf.py
    python bench/bench_prompt.py --stock --prompts 512 --repeats 1   # beside stock mlx-lm
    python bench/bench_prompt.py --slice --repeats 1 --prompts 512   # true shapes, 6 GiB
    python bench/bench_prompt.py --slice --layers 3 --experts 16 --vocabulary 4096 \\
        --weights bf16 affine4 --llama FOLDER --gguf FILES --errors 256   # and peers/llama_slice.py

Everything that is measured takes turns, prompt by prompt, in the processes of bench_decode.py. For
each length and number of threads it prints medians over the prompts: tokens/s, ms a token, the
whole, the fastest, and how many times as long as ours it took. A prompt is random tokens in chunks
of 2048, up to the logits of its last token. llama.cpp's own llama-bench does the same. Its weights
of the bundled model are Q6_K with experts in Q4_0; such it multiplies by activations that it has
quantized to 8 bits. What --slice and --stock take is said in bench_decode.py.

A slice wants three layers: nobody computes experts of the last one for tokens whose logits are not
asked for. A token takes some 0.2 billion multiply-adds in a layer's attention, 0.3 with 2048 keys
or more, 0.2 in the dense MLP and 0.3 in experts. With --errors it also prints how far the
logits of a prompt are from those of float32 arithmetic on the same weights, as parts of these
(logit_errors.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import glm52_slice
import logit_errors
from bench_decode import OURS, Contender, LlamaBench, Worker
from common import median, report
from peers.full_layers import write_full_layers

from glm_fused.checkpoint.paths import bundled_folder

WARM_UP = 512  # a longer prompt warms itself up
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
ERROR_COLUMNS = {"error": ".1e", "error p10": ".1e", "error p90": ".1e"}


class LlamaPrompts(LlamaBench):
    """llama.cpp's own benchmark of prompts."""

    def sizes(self, tokens: int) -> list[str]:
        return ["-p", str(tokens), "-n", "0", *["--no-warmup"] * (tokens > WARM_UP)]


def start(options: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """What is measured, by name, ours first; a model that is made for it goes into ``folder``."""
    script, model = "decode_worker.py", ["--prompts"]
    if options.slice:
        model += ["--slice", *glm52_slice.chosen(options).arguments()]
    elif options.stock:
        write_full_layers(folder / "full_layers")
        model += ["--model", str(folder / "full_layers")]
    else:  # other versions know no "demo"
        model += ["--model", str(bundled_folder())]
    contenders: dict[str, Contender] = {}
    for name, weights in our_names(options).items():
        contenders[name] = Worker(sys.executable, script, *model, "--weights", weights)
    if options.base:
        contenders["base"] = Worker(options.base, script, *model)
    if options.stock:
        contenders["mlx-lm"] = Worker(sys.executable, script, *model, "--stock")
    for name, file in llama_names(options).items():
        contenders[name] = LlamaPrompts(options.llama, file)
    return contenders


def our_names(options: argparse.Namespace) -> dict[str, str]:
    """Our formats of the slice, by the names under which they are printed."""
    first, *others = options.weights
    return {OURS: first} | {f"{OURS} {weights}": weights for weights in others}


def llama_names(options: argparse.Namespace) -> dict[str, Path]:
    """llama.cpp's files, by the names under which they are printed."""
    if len(options.gguf) == 1:
        return {"llama.cpp": options.gguf[0]}
    return {f"llama.cpp {file.stem}": file for file in options.gguf}


def add_errors(rows: list[dict[str, Any]], options: argparse.Namespace, folder: Path) -> None:
    """Add to each row of a contender how far its logits are from the right ones."""
    of = glm52_slice.chosen(options)
    commands = {name: logit_errors.ours(of, form) for name, form in our_names(options).items()}
    for name, file in llama_names(options).items():
        commands[name] = logit_errors.llama(options.llama, file, folder)
    found = logit_errors.errors(commands, of, options.errors, folder)
    for row in rows:
        row |= found.get(row["model"], {})


def measure(
    contenders: Mapping[str, Contender], prompt: int, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each contender; the first one is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        if isinstance(contender, Worker):  # llama-bench itself warms up each time
            contender(threads, min(prompt, WARM_UP))
    for _ in range(repeats):
        for name, contender in contenders.items():
            seconds[name].append(contender(threads, prompt).seconds)
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
    glm52_slice.add_options(parser)
    add(
        "--weights", nargs="+", choices=glm52_slice.FORMATS, default=["affine4"], help="its formats"
    )
    add("--errors", type=int, metavar="TOKENS", help="of the slice's logits, over so many tokens")
    add("--base", metavar="PYTHON", help="of an environment with another version of glm_fused")
    add("--stock", action="store_true", help="beside stock mlx-lm, on a model that it can load")
    add("--llama", type=Path, metavar="FOLDER", help="in which llama.cpp was built")
    add("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="for --llama")
    add("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if (options.llama is None) == bool(options.gguf):
        parser.error("--llama and --gguf need one another.")
    if options.slice and options.stock:
        parser.error("--slice takes another model than --stock.")
    if options.errors and not options.slice:
        parser.error("--errors needs --slice, whose formats have the same weights.")
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
        if options.errors:
            add_errors(rows, options, Path(name))
    report(rows, COLUMNS | (ERROR_COLUMNS if options.errors else {}), options.json)


if __name__ == "__main__":
    main()
