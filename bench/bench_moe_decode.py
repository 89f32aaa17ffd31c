"""Times the routed experts of one GLM layer (6144 / 2048, top-8), for one or more tokens a call.

    python bench/bench_moe_decode.py --formats affine4 mxfp4
    OMP_WAIT_POLICY=passive python bench/bench_moe_decode.py --only-fused --ggml FOLDER

It prints, per weight format: the bytes of weights that a call reads, µs, GB/s, the bandwidth of
plain streaming reads with the same threads, measured between the calls, of memory as the system
gives it (in small pages, unless it is set to give huge ones always) and in huge pages, the fraction
of the former that was reached, the fraction of what multiply-adds in registers reach, on Zen 4 and
Zen 5 the µs that the kernel's instructions take at the least (CYCLES) and the fraction of the
bandwidth that these leave, which nothing above it can reach, how many times slower the
reference path and stock MLX are, and errors against float64 arithmetic on the dequantized weights:
the largest of ours and of stock MLX (relative to the largest output), and of ours with the same
activations in fp32, which is the one before rounding (2-norm relative to the output's). Every call
picks other experts from a bank that is far larger than the caches, and lies in huge pages as loaded
weights do. With --ggml llama.cpp computes such experts, too (peers/llama_cpp.py), alternately with
ours, in its types of as many bits: µs of the fastest, and how many times slower; its threads would
spin between the calls, but for that policy.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import DTYPES, median, multiply_add_rate, parser, report
from peers import llama_cpp, llama_experts

import glm_fused
from glm_fused import _ext, ops
from glm_fused.formats.weights import FORMATS, GGUF, dequantize
from glm_fused.host import to_numpy
from glm_fused.selftest.benchmark import RoutedExperts, Yardsticks, read_bandwidth, seconds

COLUMNS = {
    "format": "",
    "tokens": "d",
    "MB": ".1f",
    "us": ".0f",
    "GB/s": ".2f",
    "read GB/s": ".2f",
    "huge GB/s": ".2f",
    "fraction": ".2f",
    "of peak": ".2f",
    "bound us": ".0f",
    "bound": ".2f",
    "x reference": ".1f",
    "x stock": ".1f",
    "error": ".1e",
    "fp32 error": ".1e",
    "stock error": ".1e",
}
GGML_COLUMNS = {"llama.cpp": "", "their us": ".0f", "x llama.cpp": ".2f"}

# The cycles that a Zen 4 and a Zen 5 core take at the least for 16 weights where one vector meets
# whole rows: kernel_cycles.py counts them in the inner loops that GCC 12 makes, and says what takes
# which pipe. Floats wait for memory.
CYCLES = {
    "avx512": {
        "affine2": (1.59, 0.80),
        "affine3": (2.00, 1.00),
        "affine4": (1.75, 0.88),
        "affine5": (2.60, 1.30),
        "affine6": (2.75, 1.38),
        "affine8": (2.31, 1.16),
        "ggml-mxfp4": (2.15, 0.91),
        "iq1_m": (2.24, 1.68),
        "iq1_s": (2.11, 1.59),
        "iq2_s": (2.21, 1.65),
        "iq2_xs": (2.48, 1.13),
        "iq2_xxs": (2.42, 1.07),
        "iq3_s": (2.81, 1.34),
        "iq3_xxs": (2.50, 1.11),
        "iq4_nl": (2.00, 0.79),
        "iq4_xs": (2.10, 0.88),
        "mxfp4": (1.79, 0.88),
        "mxfp8": (3.19, 1.59),
        "nvfp4": (1.88, 0.94),
        "q2_k": (2.08, 0.90),
        "q3_k": (2.50, 1.17),
        "q4_0": (1.83, 0.85),
        "q4_k": (2.04, 0.99),
        "q5_0": (3.37, 1.79),
        "q5_k": (2.82, 1.43),
        "q6_k": (2.54, 1.28),
        "q8_0": (2.10, 1.07),
    },
    "avx2": {
        "affine2": (1.84, 1.84),
        "affine3": (2.38, 2.38),
        "affine4": (1.94, 1.94),
        "affine5": (3.15, 3.15),
        "affine6": (3.28, 3.28),
        "affine8": (2.44, 2.44),
        "mxfp4": (2.21, 2.19),
        "mxfp8": (3.44, 3.44),
        "nvfp4": (2.34, 2.34),
    },
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

    def unrounded(self, slots: mx.array, scores: mx.array) -> mx.array:
        """The sum [tokens, hidden] of the same activations in float32, where no step rounds."""
        x = self.x.astype(mx.float32)
        return ops.moe_decode(x, self.gate, self.up, self.down, slots, scores)

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
    if not w.format.mode:  # MLX has none
        return in_float64(dequantize(ops.Weight(one, w.format), mx.float32))
    if w.format.mode == "affine":
        one[1:] = [a.astype(mx.float32) for a in one[1:]]
    values = mx.dequantize(*one, **w.format.parameters, dtype=mx.float32)
    return in_float64(values)


def error(y: mx.array, exact: np.ndarray) -> float:
    return float(np.abs(in_float64(y[0]) - exact).max() / np.abs(exact).max())


def zen() -> int | None:
    """Which of the processors that CYCLES knows this is, 4 or 5."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (25|26)$", text, re.MULTILINE)
    if not family or "avx512f" not in text:  # Zen 3 is of family 25, too
        return None
    return {"25": 4, "26": 5}[family[1]]


def bound(name: str, weights: int, peak: float) -> float | None:
    """The seconds that the pipes take for ``weights`` at the least.

    The clock is that of ``peak``: two vectors of multiply-adds a cycle and core.
    """
    kernels, core = _ext.cpu_kernels(), zen()
    if core is None or name not in CYCLES.get(kernels, {}):
        return None
    per_cycle = 32 if core == 5 and kernels == "avx512" else 16
    return weights / 16 * CYCLES[kernels][name][core - 4] * per_cycle / peak


def norm_error(y: mx.array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(in_float64(y[0]) - exact) / np.linalg.norm(exact))


def measure_ggml(
    name: str, layer: Layer, ggml: llama_cpp.Library, options: argparse.Namespace
) -> dict[str, Any]:
    """The fastest of llama.cpp's types with the format's bits, alternately with ours."""
    rng, found = np.random.default_rng(2), []
    for kind in llama_experts.PEERS.get(name, ()):
        sizes = (options.hidden, options.intermediate, layer.bank, options.top_k)
        peer = llama_experts.Experts(ggml, kind, *sizes)
        ours, theirs = [], []
        for _ in range(options.repeats * options.calls):
            slots, scores = layer.route()
            ours.append(seconds(lambda s=slots, c=scores: layer.fused(s, c)))
            peer.route(rng)
            start = time.perf_counter()
            peer.run()
            theirs.append(time.perf_counter() - start)
        peer.free()
        found.append((median(theirs), median(ours), kind))
    if not found:
        return {}
    taken, mine, kind = min(found)
    return {"llama.cpp": kind, "their us": taken * 1e6, "x llama.cpp": taken / mine}


def measure(
    name: str,
    yardsticks: Yardsticks,
    ggml: llama_cpp.Library | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    layer = Layer(name, options)
    times, rates, bandwidths, huge, fractions, peaks = [], [], [], [], [], []
    layer.fused(*layer.route())
    for _ in range(options.repeats):
        bandwidth = read_bandwidth(yardsticks.given)
        huge.append(read_bandwidth(yardsticks.huge))
        peaks.append(multiply_add_rate())
        took, read = [], []
        for _ in range(options.calls):
            slots, scores = layer.route()
            distinct = len(np.unique(to_numpy(slots)))
            took.append(seconds(lambda s=slots, c=scores: layer.fused(s, c)))
            read.append(distinct * layer.expert_bytes / took[-1] / 1e9)
        bandwidth = (bandwidth + read_bandwidth(yardsticks.given)) / 2
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
        "huge GB/s": median(huge) if yardsticks.moved else None,
        "fraction": median(fractions),
        "of peak": work / median(times) / median(peaks),
    }
    if options.tokens == 1 and (at_least := bound(name, work, median(peaks))):
        row["bound us"] = at_least * 1e6
        row["bound"] = row["MB"] / 1e3 / at_least / row["read GB/s"]
    if ggml is not None:
        row |= measure_ggml(name, layer, ggml, options)
    slots, scores = layer.route()
    exact = layer.exact(slots, scores)
    row["error"] = error(layer.fused(slots, scores), exact)
    row["fp32 error"] = norm_error(layer.unrounded(slots, scores), exact)
    if not options.only_fused:
        reference = seconds(lambda: layer.fused(slots, scores, reference=True))
        row["x reference"] = reference / median(times)
    # MLX's gather_mm on the CPU takes fp32 only, and of GGUF's blocks MLX has no ops.
    mode = layer.gate.format.mode
    if not options.only_fused and mode and (mode != "dense" or options.dtype == "fp32"):
        stock = seconds(lambda: layer.stock(slots, scores))
        row["x stock"] = stock / median(times)
        row["stock error"] = error(layer.stock(slots, scores), exact)
    return row


def main() -> None:
    arguments = parser(__doc__ or "", others=[fmt.name for fmt in GGUF])
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--tokens", type=int, default=1)
    arguments.add_argument("--hidden", type=int, default=6144)
    arguments.add_argument("--intermediate", type=int, default=2048)
    arguments.add_argument("--top-k", type=int, default=8)
    arguments.add_argument("--calls", type=int, default=5, help="calls per repeat")
    arguments.add_argument("--bank-gb", type=float, default=3, help="size of the bank of experts")
    arguments.add_argument("--only-fused", action="store_true", help="skip reference and stock MLX")
    arguments.add_argument("--ggml", type=Path, metavar="FOLDER", help="with ggml's libraries")
    options = arguments.parse_args()
    mx.set_default_device(mx.cpu)
    if options.threads:
        glm_fused.set_num_threads(options.threads)
    yardsticks = Yardsticks()
    ggml = llama_cpp.Library(options.ggml, glm_fused.num_threads()) if options.ggml else None
    if ggml and options.tokens > 1:
        arguments.error("--ggml compares one token.")
    rows = [measure(name, yardsticks, ggml, options) for name in options.formats]
    report(rows, COLUMNS | (GGML_COLUMNS if ggml else {}), options.json)


if __name__ == "__main__":
    main()
