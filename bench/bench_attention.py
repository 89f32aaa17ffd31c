"""One GLM layer's long-context part: the lightning indexer and sparse MLA, over cached contexts.

    python bench/bench_attention.py --contexts 2048 32768 131072 --formats bf16 fp8
    python bench/bench_attention.py --plot attention.png         # needs matplotlib
    python bench/bench_attention.py --formats fp16 --ggml FOLDER # and peers/llama_cpp.py
    python bench/bench_attention.py --formats fp16 --ggml FOLDER --contexts 131072 --tokens 32

GLM-5.2's geometry: indexer of 32 heads x 128, 2048 keys selected, 64 heads over rows of 512 + 64.
It prints a row per context and cache format, with the same numbers for the indexer with its top-k
and for the attention: µs, GB/s of cached rows read, GFLOP/s, the fraction of its bound that it
reaches, and how many times slower stock MLX ops are (one call each, up to --stock-up-to). The bound
is the time that the rows' bytes take at the streaming bandwidth, or the multiply-adds at the rate
that registers allow, whichever is more; both are measured before and after every call, with the
same threads. Several copies of the cache are used in turn, so that it comes from memory, as it does
when a model's layers follow one another.

With --ggml it also calls llama.cpp's indexer, top-k and attention, for as many queries and
alternately with ours on the same keys, and prints how many times slower the whole chain is. Both
must select the same keys (but for ties and rounding) and agree on the output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import median, multiply_add_rate, parser, report
from peers import llama_cpp

import glm_fused
from glm_fused import _ext, ops
from glm_fused.formats import kv_rows
from glm_fused.host import to_numpy
from glm_fused.ops import stock
from glm_fused.selftest.benchmark import read_bandwidth, seconds

INDEX_HEADS, INDEX_DIM, TOPK = 32, 128, 2048
HEADS, RANK, ROPE, SCALE = 64, 512, 64, 0.0625
FORMATS = ("bf16", "fp16", "fp32", "fp8", "int8")
CONTEXTS = [2**i for i in range(11, 21)]
BEYOND_CACHE = 100e6  # so many bytes of cached rows are used in turn

COLUMNS = {
    "format": "",
    "context": "d",
    "tokens": "d",
    "indexer us": ".0f",
    "ix GB/s": ".2f",
    "ix GFLOP/s": ".1f",
    "ix fraction": ".2f",
    "ix x stock": ".1f",
    "attention us": ".0f",
    "at GB/s": ".2f",
    "at GFLOP/s": ".1f",
    "at fraction": ".2f",
    "at x stock": ".1f",
}
GGML_COLUMNS = {"ggml indexer us": ".0f", "ggml attention us": ".0f", "chain x ggml": ".1f"}


class Layer:
    """One layer's cache and the queries of one step."""

    def __init__(self, kv_format: str, context: int, tokens: int, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def random(*shape: int) -> mx.array:
            values = rng.standard_normal(min(1 << 22, int(np.prod(shape))), dtype=np.float32)
            return mx.array(np.resize(values, shape)).astype(mx.bfloat16)

        # Rows are packed in pieces, as the float32 values of a million of them would not fit.
        pieces = [min(1 << 15, context - i) for i in range(0, context, 1 << 15)]
        packed = kv_format in kv_rows.PACKED
        keys, latents, ropes = [], [], []
        for n in pieces:
            k, c, r = random(1, n, INDEX_DIM), random(1, n, RANK), random(1, n, ROPE)
            if packed:
                keys.append(kv_rows.pack(k, None, kv_format))
                latents.append(kv_rows.pack(c, r, kv_format))
            else:
                dtype = kv_rows.FLOATS[kv_format]
                keys.append(k.astype(dtype))
                latents.append(c.astype(dtype))
                ropes.append(r.astype(dtype))
            mx.eval(keys[-1], latents[-1])
        self.keys, self.latents = mx.concatenate(keys, 1), mx.concatenate(latents, 1)
        self.ropes = None if packed else mx.concatenate(ropes, 1)
        self.weights = random(1, tokens, INDEX_HEADS).astype(mx.float32)
        self.index_q = random(1, tokens, INDEX_HEADS, INDEX_DIM)
        self.q = random(1, tokens, HEADS, RANK + ROPE)
        self.selected = self.indexer()
        mx.eval(self.keys, self.latents, self.ropes, self.selected, self.q)
        if mx.default_device() == mx.cpu:
            for rows in (self.keys, self.latents, self.ropes):
                if rows is not None:
                    _ext.move_to_huge_pages(rows)

    def in_ggml(self, ggml: llama_cpp.Library) -> tuple[llama_cpp.Indexer, llama_cpp.Attention]:
        """The same step in llama.cpp; raises SystemExit if it has another result."""

        def numpy(a: mx.array, dtype: Any) -> Any:
            return to_numpy(a.astype(mx.float32))[0].astype(dtype)

        assert self.ropes is not None
        keys, weights = numpy(self.keys, np.float16), numpy(self.weights, np.float32)
        q, rows = numpy(self.index_q, np.float32), mx.concatenate([self.latents, self.ropes], -1)
        indexer = llama_cpp.Indexer(ggml, q, keys, weights * INDEX_DIM**-0.5, TOPK)
        indexer.run()
        selected = to_numpy(self.selected)[0]
        pairs = zip(indexer.selected(), selected, strict=True)
        common = min(np.intersect1d(theirs, our).size for theirs, our in pairs)
        attention = llama_cpp.Attention(
            ggml, numpy(self.q, np.float32), numpy(rows, np.float16), selected, RANK, SCALE
        )
        attention.run()
        ours = numpy(self.attention(), np.float32)
        error = np.abs(attention.result() - ours).max() / np.abs(ours).max()
        if common < 0.99 * TOPK or not error < 0.02:
            raise SystemExit(
                f"ggml selects {common} of {TOPK} same keys, attention differs {error}."
            )
        return indexer, attention

    def indexer(self, op: Callable[..., mx.array] = ops.indexer_topk) -> mx.array:
        scale = INDEX_DIM**-0.5
        return op(self.index_q, self.keys, self.weights, TOPK, scale=scale)

    def attention(self, op: Callable[..., mx.array] = ops.sparse_mla_decode) -> mx.array:
        return op(self.q, self.latents, self.ropes, self.selected, rank=RANK, scale=SCALE)


CALLS: dict[str, Callable[..., mx.array]] = {"ix": Layer.indexer, "at": Layer.attention}
STOCK = {"ix": stock.indexer_topk, "at": stock.sparse_mla_decode}


def floor(layer: Layer, size: int, work: int) -> float:
    """The seconds that `size` bytes or `work` multiply-adds take just now, whichever is more."""
    bandwidth = read_bandwidth(layer.latents) * 1e9
    return max(size / bandwidth, work / multiply_add_rate())


@dataclass
class Samples:
    """The seconds of every call, and for each the fraction of them that its bound would take."""

    times: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)

    def take(self, layer: Layer, call: Callable[[Layer], mx.array], size: int, work: int) -> None:
        before = floor(layer, size, work)
        self.times.append(seconds(lambda: call(layer)))
        after = floor(layer, size, work)
        self.fractions.append((before + after) / 2 / self.times[-1])


def measure_ggml(peers: Sequence[llama_cpp.Graph], taken: Sequence[list[float]]) -> None:
    for graph, times in zip(peers, taken, strict=True):
        start = time.perf_counter()
        graph.run()
        times.append(time.perf_counter() - start)
        time.sleep(0.02)  # its threads spin a while before they sleep


def measure(
    kv_format: str, context: int, options: argparse.Namespace, ggml: llama_cpp.Library | None
) -> dict[str, Any]:
    tokens = options.tokens
    selected = min(context, TOPK)
    size = {
        "ix": context * kv_rows.row_bytes(kv_format, INDEX_DIM, 0),
        "at": selected * kv_rows.row_bytes(kv_format, RANK, ROPE) * tokens,
    }
    work = {
        "ix": context * INDEX_HEADS * INDEX_DIM * tokens if context > TOPK else 0,
        "at": selected * HEADS * (2 * RANK + ROPE) * tokens,
    }
    copies = max(1, min(16, int(BEYOND_CACHE / (context * kv_rows.row_bytes(kv_format, 128, 0)))))
    layers = [Layer(kv_format, context, tokens, seed) for seed in range(copies)]
    peers = [layer.in_ggml(ggml) for layer in layers] if ggml else []
    samples = {"ix": Samples(), "at": Samples()}
    theirs: tuple[list[float], list[float]] = ([], [])
    for turn in range(options.repeats + 2):
        for part, sample in samples.items():
            sample.take(layers[turn % copies], CALLS[part], size[part], work[part])
        if peers:
            measure_ggml(peers[turn % copies], theirs)
    row: dict[str, Any] = {"format": kv_format, "context": context, "tokens": tokens}
    for part, name in (("ix", "indexer"), ("at", "attention")):
        took = median(samples[part].times[2:])
        row[f"{name} us"] = took * 1e6
        if work[part]:
            row[f"{part} GB/s"] = size[part] / took / 1e9
            row[f"{part} GFLOP/s"] = 2e-9 * work[part] / took
            row[f"{part} fraction"] = median(samples[part].fractions[2:])
        if context <= options.stock_up_to:
            slow = seconds(lambda part=part: CALLS[part](layers[0], STOCK[part]))
            row[f"{part} x stock"] = slow / took
    if peers:
        indexer, attention = (1e6 * median(times[2:]) for times in theirs)
        row |= {"ggml indexer us": indexer, "ggml attention us": attention}
        chain = row["indexer us"] + row["attention us"]
        row["chain x ggml"] = (indexer + attention) / chain
    return row


def plot(made: list[dict[str, Any]], path: str) -> None:
    """Draw µs over context, one pair of lines per format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for kv_format in dict.fromkeys(row["format"] for row in made):
        lines = [row for row in made if row["format"] == kv_format]
        contexts = [row["context"] for row in lines]
        for name, style in (("indexer", "-o"), ("attention", "--s")):
            times = [row[f"{name} us"] for row in lines]
            axes.loglog(contexts, times, style, base=2, label=f"{name}, {kv_format}")
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("µs per layer and token")
    axes.set_yscale("log", base=10)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parser(__doc__ or "", FORMATS)
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.set_defaults(formats=["bf16", "fp8"], repeats=99)
    arguments.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    arguments.add_argument("--tokens", type=int, default=1, help="query tokens of a call")
    arguments.add_argument("--stock-up-to", type=int, default=32768, metavar="CONTEXT")
    arguments.add_argument("--ggml", type=Path, metavar="FOLDER", help="with ggml's libraries")
    arguments.add_argument("--plot", metavar="FILE", help="draw the times, with matplotlib")
    options = arguments.parse_args()
    mx.set_default_device(mx.cpu)
    if options.threads:
        glm_fused.set_num_threads(options.threads)
    ggml = llama_cpp.Library(options.ggml, glm_fused.num_threads()) if options.ggml else None
    least = TOPK + options.tokens  # all queries select
    if ggml and (options.formats != ["fp16"] or min(options.contexts) < least):
        arguments.error(f"--ggml compares --formats fp16, contexts from {least}.")
    made = [
        measure(kv_format, context, options, ggml)
        for kv_format in options.formats
        for context in options.contexts
    ]
    report(made, COLUMNS | (GGML_COLUMNS if ggml else {}), options.json)
    if options.plot:
        plot(made, options.plot)


if __name__ == "__main__":
    main()
