"""Times the routed experts of one GLM layer (6144 / 2048, top-8), for one or more tokens a call.

    python bench/bench_moe_decode.py --formats affine4 mxfp4

It prints, per weight format: the bytes of weights that a call reads, µs, GB/s, the plain streaming
read bandwidth measured between the calls with the same threads, the fraction of it reached, the
fraction of what multiply-adds in registers reach, how many times slower the reference path and
stock MLX are, and the largest error of ours and of stock MLX against float64 arithmetic on the
dequantized weights (relative to the largest output).
Every call picks other experts from a bank that is far larger than the caches.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import numpy as np
from common import DTYPES, median, multiply_add_rate, parser, report

import glm_fused
from glm_fused import ops
from glm_fused.formats.weights import FORMATS
from glm_fused.host import to_numpy
from glm_fused.selftest.benchmark import RoutedExperts, read_bandwidth, seconds

COLUMNS = {
    "format": "",
    "tokens": "d",
    "MB": ".1f",
    "us": ".0f",
    "GB/s": ".2f",
    "read GB/s": ".2f",
    "fraction": ".2f",
    "of peak": ".2f",
    "x reference": ".1f",
    "x stock": ".1f",
    "error": ".1e",
    "stock error": ".1e",
}


class Layer(RoutedExperts):
    def __init__(self, name: str, options: argparse.Namespace) -> None:
        hidden, intermediate = options.hidden, options.intermediate
        expert = 3 * hidden * intermediate * FORMATS[name].bits_per_weight / 8
        super().__init__(
            FORMATS[name],
            DTYPES[options.dtype],
            tokens=options.tokens,
            top_k=options.top_k,
            hidden=hidden,
            intermediate=intermediate,
            bank=int(min(256, max(2 * options.top_k, options.bank_gb * 1e9 // expert))),
        )

    def exact(self, slots: mx.array, scores: mx.array) -> np.ndarray:
        """The first token's output [hidden], computed in float64."""
        x = in_float64(self.x[0])
        total = np.zeros(x.shape)
        for e, score in zip(to_numpy(slots)[0], to_numpy(scores)[0], strict=True):
            gate, up, down = (dequantized(w, int(e)) for w in (self.gate, self.up, self.down))
            h = gate @ x
            total += score * (down @ (h / (1 + np.exp(-h)) * (up @ x)))
        return total


def in_float64(a: mx.array) -> np.ndarray:
    return to_numpy(a.astype(mx.float32)).astype(np.float64)


def dequantized(w: ops.Weight, slot: int) -> np.ndarray:
    one = [plane[slot] for plane in w.planes]
    if w.format.mode == "dense":
        return in_float64(one[0])
    if w.format.mode == "affine":
        one[1:] = [a.astype(mx.float32) for a in one[1:]]
    values = mx.dequantize(*one, **w.format.parameters, dtype=mx.float32)
    return in_float64(values)


def error(y: mx.array, exact: np.ndarray) -> float:
    return float(np.abs(in_float64(y[0]) - exact).max() / np.abs(exact).max())


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    layer = Layer(name, options)
    times, rates, bandwidths, fractions, peaks = [], [], [], [], []
    layer.fused(*layer.route())
    for _ in range(options.repeats):
        bandwidth = read_bandwidth(layer.gate.planes[0])
        peaks.append(multiply_add_rate())
        took, read = [], []
        for _ in range(options.calls):
            slots, scores = layer.route()
            distinct = len(np.unique(to_numpy(slots)))
            took.append(seconds(lambda s=slots, c=scores: layer.fused(s, c)))
            read.append(distinct * layer.expert_bytes / took[-1] / 1e9)
        bandwidth = (bandwidth + read_bandwidth(layer.gate.planes[0])) / 2
        times.append(median(took))
        rates.append(median(read))
        bandwidths.append(bandwidth)
        fractions.append(rates[-1] / bandwidth)
    work = 3 * options.hidden * options.intermediate * options.top_k * options.tokens
    row: dict[str, Any] = {
        "format": name,
        "tokens": options.tokens,
        "MB": median(rates) * median(times) * 1e3,
        "us": median(times) * 1e6,
        "GB/s": median(rates),
        "read GB/s": median(bandwidths),
        "fraction": median(fractions),
        "of peak": work / median(times) / median(peaks),
    }
    slots, scores = layer.route()
    exact = layer.exact(slots, scores)
    row["error"] = error(layer.fused(slots, scores), exact)
    if not options.only_fused:
        reference = seconds(lambda: layer.fused(slots, scores, reference=True))
        row["x reference"] = reference / median(times)
    # MLX's gather_mm on the CPU takes fp32 only.
    if not options.only_fused and (layer.gate.format.mode != "dense" or options.dtype == "fp32"):
        stock = seconds(lambda: layer.stock(slots, scores))
        row["x stock"] = stock / median(times)
        row["stock error"] = error(layer.stock(slots, scores), exact)
    return row


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--tokens", type=int, default=1)
    arguments.add_argument("--hidden", type=int, default=6144)
    arguments.add_argument("--intermediate", type=int, default=2048)
    arguments.add_argument("--top-k", type=int, default=8)
    arguments.add_argument("--calls", type=int, default=5, help="calls per repeat")
    arguments.add_argument("--bank-gb", type=float, default=3, help="size of the bank of experts")
    arguments.add_argument("--only-fused", action="store_true", help="skip reference and stock MLX")
    options = arguments.parse_args()
    mx.set_default_device(mx.cpu)
    if options.threads:
        glm_fused.set_num_threads(options.threads)
    rows = [measure(name, options) for name in options.formats]
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
