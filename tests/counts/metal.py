"""Counts what a GPU does for one token in a layer of GLM-5.2's shapes, launch by launch.

    python bench/metal_launches.py                       # a full sparse layer, a context of 4,096
    python bench/metal_launches.py --kv-format fp8 --format mxfp4 --json

The simulator runs and traces the launches, so this takes minutes and tells nothing of time. It
prints of each: threadgroups, threads in each, bytes of threadgroup memory; the MB that it reads of
device memory, each byte once and each read; the MB that it reads and writes of threadgroup memory;
its barriers; and the multiply-adds that its products have by their shapes, and how many that is a
thread. Rows are in the caches before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from common import report

from glm_fused import ops
from glm_fused.formats import kv_rows
from glm_fused.formats.weights import FORMATS, Weight
from glm_fused.ops import blocks, metal_sim
from glm_fused.selftest.synthetic import Bits

HIDDEN, Q_RANK, RANK, ROPE, NOPE, VALUES, HEADS = 6144, 2048, 512, 64, 192, 256, 64
INDEX_HEADS, INDEX_DIM, SELECTED = 32, 128, 2048
EXPERTS, TOP_K, INTERMEDIATE, EPS = 256, 8, 2048, 1e-5
ROUTING = dict(n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)

COLUMNS = {
    "launch": "",
    "threadgroups": "d",
    "threads": "d",
    "tg bytes": "d",
    "read MB": ".2f",
    "all reads MB": ".2f",
    "tg read MB": ".2f",
    "tg written MB": ".2f",
    "barriers": ".0f",
    "MFMA": ".1f",
    "FMA/thread": ".0f",
}

# What gives a stage's arrays, and the multiply-adds of its launches; None for one that is left out.
Stage = tuple[Callable[[], Any], list[int | None]]


class Layer:
    """A full layer with routed experts, and the cache of a context."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.bits, self.fmt, self.context = Bits(0), FORMATS[options.format], options.context
        self.kv_format = options.kv_format
        self.x = self.floats(1, 1, HIDDEN)

    def floats(self, *shape: int) -> mx.array:
        return self.bits.floats(shape, mx.bfloat16)

    def norm(self, n: int) -> tuple[mx.array, float]:
        return self.floats(n), EPS

    def weight(self, *shape: int) -> Weight:
        return self.bits.weight(shape, self.fmt, mx.bfloat16)

    def dense(self, *shape: int) -> Weight:
        return Weight.dense(self.floats(*shape))

    def mlp(self, intermediate: int, *experts: int) -> tuple[Weight, Weight, Weight]:
        gate, up = (self.weight(*experts, intermediate, HIDDEN) for _ in range(2))
        return gate, up, self.weight(*experts, HIDDEN, intermediate)

    def rows(self, rank: int, rope: int) -> tuple[mx.array, mx.array | None]:
        latents, ropes = self.floats(1, self.context, rank), self.floats(1, self.context, rope)
        if self.kv_format not in kv_rows.PACKED:
            dtype = kv_rows.FLOATS[self.kv_format]
            return latents.astype(dtype), ropes.astype(dtype) if rope else None
        wide = latents.astype(mx.float32), ropes.astype(mx.float32) if rope else None
        return kv_rows.pack(*wide, self.kv_format), None

    def project(self) -> Stage:
        angles = mx.zeros((2, 1, 1, 1, ROPE // 2))
        full = blocks.IndexerArguments(
            self.weight(INDEX_DIM, HIDDEN), self.norm(INDEX_DIM), self.floats(INDEX_DIM),
            self.weight(INDEX_HEADS * INDEX_DIM, Q_RANK), self.dense(INDEX_HEADS, HIDDEN),
            INDEX_HEADS, True, True,
        )  # fmt: skip
        given = (
            self.x, angles[0], angles[1], self.norm(HIDDEN), self.weight(Q_RANK, HIDDEN),
            self.norm(Q_RANK), self.weight(HEADS * (NOPE + ROPE), Q_RANK),
            self.weight(RANK + ROPE, HIDDEN), self.norm(RANK), self.weight(HEADS, RANK, NOPE), NOPE,
        )  # fmt: skip
        first = Q_RANK + RANK + ROPE + INDEX_DIM + INDEX_HEADS
        second = HEADS * (NOPE + ROPE) + INDEX_HEADS * INDEX_DIM
        return lambda: blocks.attention_project(*given, full), [
            first * HIDDEN,
            second * Q_RANK,
            HEADS * RANK * NOPE,
        ]

    def choose(self) -> Stage:
        keys, _ = self.rows(INDEX_DIM, 0)
        q, weights = self.floats(1, 1, INDEX_HEADS, INDEX_DIM), mx.ones((1, 1, INDEX_HEADS))
        products = self.context * INDEX_HEADS * (INDEX_DIM + 1)
        return lambda: ops.indexer_topk(q, keys, weights, SELECTED, scale=1.0), [products, 0]

    def attend(self) -> Stage:
        selected = mx.arange(SELECTED, dtype=mx.int32) * (self.context // SELECTED)
        given = (
            self.x, self.floats(1, 1, HEADS, RANK + ROPE), *self.rows(RANK, ROPE),
            selected[None, None], self.weight(HEADS, VALUES, RANK),
            self.weight(HIDDEN, HEADS * VALUES),
        )  # fmt: skip
        return lambda: blocks.attend(*given, rank=RANK, scale=0.0625), [
            HEADS * SELECTED * (2 * RANK + ROPE),
            HEADS * RANK * (SELECTED // 64 + VALUES),
            HIDDEN * HEADS * VALUES,
        ]

    def mix(self, experts: int, intermediate: int, *products: int | None) -> Stage:
        router = self.floats(experts, HIDDEN).astype(mx.float32)
        bank, shared = self.mlp(intermediate, experts), self.mlp(intermediate)
        given = self.x, self.norm(HIDDEN), (router, mx.zeros(experts)), bank, shared
        return lambda: blocks.moe_block(*given, top_k=TOP_K, **ROUTING), [*products]

    def route(self) -> Stage:
        """Among all experts, which are cut short: their own launches do not count."""
        return self.mix(EXPERTS, 64, EXPERTS * HIDDEN, 0, None, None)

    def experts(self) -> Stage:
        """Of those that the token takes, which are a whole bank."""
        taken = (TOP_K + 1) * INTERMEDIATE * HIDDEN
        return self.mix(TOP_K, INTERMEDIATE, None, None, 2 * taken, taken)


def counted(stage: Stage) -> Iterator[dict[str, Any]]:
    """A row for each launch of a stage."""
    run, products = stage
    with metal_sim.simulated(trace=True):
        mx.eval(run())
    for launch, fma in zip(metal_sim.take_launches(), products, strict=True):
        if fma is None:
            continue
        seen = launch.report
        own = seen.traffic.values()
        yield {
            "launch": launch.kernel.removeprefix("glm_fused_").partition("_bfloat16")[0],
            "threadgroups": seen.threadgroups,
            "threads": seen.threads // seen.threadgroups,
            "tg bytes": seen.threadgroup_bytes,
            "read MB": sum(t.unique_read for t in own) / 1e6,
            "all reads MB": sum(t.read for t in own) / 1e6,
            "tg read MB": seen.threadgroup_read / 1e6,
            "tg written MB": seen.threadgroup_written / 1e6,
            "barriers": seen.barriers / seen.threadgroups,
            "MFMA": fma / 1e6,
            "FMA/thread": fma / seen.threads,
        }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--format", choices=list(FORMATS), default="affine4", help="of weights")
    arguments.add_argument(
        "--kv-format", choices=[*kv_rows.FLOATS, *kv_rows.PACKED], default="bf16", help="of rows"
    )
    arguments.add_argument("--context", type=int, default=4096, help="cached tokens")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args()
    mx.set_default_device(mx.cpu)
    layer = Layer(options)
    rows = []
    for make in (layer.project, layer.choose, layer.attend, layer.route, layer.experts):
        rows += counted(make())
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
