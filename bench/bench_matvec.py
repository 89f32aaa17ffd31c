"""Times dense projections of GLM-5 as quantized_matvec runs them.

    python bench/bench_matvec.py --formats affine4 bf16 --rows 1 16 512

It prints, per projection, format and number of rows (tokens): µs, µs per row, GB/s of weights, the
plain streaming read bandwidth measured in the same run and the fraction of it, GFLOP/s, the
fraction of what multiply-adds in registers reach in the same run, and how many times slower the
reference path and stock MLX are (each timed once, on one row). Several copies of a weight are used
in turn, so that it comes from memory and not from a cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import numpy as np
from common import DTYPES, median, multiply_add_rate, parser, report

import glm_fused
from glm_fused import ops
from glm_fused.formats.weights import FORMATS, GGUF
from glm_fused.ops import stock
from glm_fused.selftest.benchmark import nbytes, read_bandwidth, seconds
from glm_fused.selftest.synthetic import Bits

# [out, in]
PROJECTIONS = {
    "q_a_proj": (2048, 6144),
    "q_b_proj": (16384, 2048),
    "o_proj": (6144, 16384),
    "shared_expert": (2048, 6144),
    "dense_mlp": (12288, 6144),
}
BEYOND_CACHE = 300e6  # so many bytes of weights are used in turn

COLUMNS = {
    "projection": "",
    "format": "",
    "rows": "d",
    "us": ".0f",
    "us/row": ".1f",
    "GB/s": ".2f",
    "read GB/s": ".2f",
    "fraction": ".2f",
    "GFLOP/s": ".1f",
    "of peak": ".2f",
    "x reference": ".1f",
    "x stock": ".1f",
}


def measure(projection: str, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    n, k = PROJECTIONS[projection]
    copies = max(2, int(BEYOND_CACHE / (n * k * FORMATS[name].bits_per_weight / 8)))
    bits = Bits(0)
    weights = [bits.weight((n, k), FORMATS[name], mx.bfloat16) for _ in range(copies)]
    mx.eval(*(plane for w in weights for plane in w.planes))
    rng = np.random.default_rng(0)
    made = []
    for rows in options.rows:
        x = mx.array(rng.standard_normal((rows, k))).astype(DTYPES[options.dtype])
        mx.eval(x)
        times, bandwidths, peaks = [], [], []
        for i in range(options.repeats * copies):
            if i % copies == 0:
                bandwidths.append(read_bandwidth(weights[i % copies].planes[0]))
                peaks.append(multiply_add_rate())
            w = weights[i % copies]
            times.append(seconds(lambda w=w, x=x: ops.quantized_matvec(x, w, reference=False)))
            if sum(times) > options.seconds:
                break
        took, bandwidth = median(times), median(bandwidths)
        row = {
            "projection": projection,
            "format": name,
            "rows": rows,
            "us": took * 1e6,
            "us/row": took * 1e6 / rows,
            "GB/s": nbytes(weights[0]) / took / 1e9,
            "read GB/s": bandwidth,
            "fraction": nbytes(weights[0]) / took / 1e9 / bandwidth,
            "GFLOP/s": 2e-9 * n * k * rows / took,
            "of peak": n * k * rows / took / median(peaks),
        }
        if rows == 1 and not options.only_fused:
            w = weights[0]
            reference = seconds(lambda w=w, x=x: ops.quantized_matvec(x, w, reference=True))
            row["x reference"] = reference / took
            if w.format.mode:  # else MLX has no ops of it
                row["x stock"] = seconds(lambda w=w, x=x: stock.quantized_matvec(x, w)) / took
        made.append(row)
    return made


def main() -> None:
    arguments = parser(__doc__ or "", others=[fmt.name for fmt in GGUF])
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 2, 16, 256])
    arguments.add_argument(
        "--projections", nargs="+", choices=PROJECTIONS, default=["q_b_proj", "shared_expert"]
    )
    arguments.add_argument("--seconds", type=float, default=2, help="at most, per line")
    arguments.add_argument("--only-fused", action="store_true", help="skip reference and stock MLX")
    options = arguments.parse_args()
    mx.set_default_device(mx.cpu)
    if options.threads:
        glm_fused.set_num_threads(options.threads)
    rows = [
        row
        for projection in options.projections
        for name in options.formats
        for row in measure(projection, name, options)
    ]
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
