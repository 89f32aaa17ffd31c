"""Counts what a GPU does in a layer of GLM-5's structure, launch by launch.

    python -m tests.counts.metal                       # GLM-5.2's shapes, a context of 4,096
    python -m tests.counts.metal --kv-format fp8 --format mxfp4 --json

The simulator runs and traces the launches, so GLM-5.2's shapes take minutes, and it tells nothing
of time. It prints of each: threadgroups, threads in each, bytes of threadgroup memory; the MB that
it reads of device memory, each byte once and each read; the MB that it reads and writes of
threadgroup memory; its barriers; and the multiply-adds that its products have by their shapes, and
how many that is a thread. Rows are in the caches before.

`recorded` counts the same of a small layer, and of a few tokens of a prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from glm_fused import ops
from glm_fused.formats import kv_rows
from glm_fused.formats.weights import FORMATS, Weight
from glm_fused.ops import blocks, metal_sim
from glm_fused.selftest.synthetic import Bits

EPS = 1e-5
ROUTING = dict(n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)

COLUMNS = {
    "stage": "",
    "launch": "",
    "threadgroups": "d",
    "threads": "d",
    "tg bytes": "d",
    "read MB": ".3f",
    "all reads MB": ".3f",
    "tg read MB": ".3f",
    "tg written MB": ".3f",
    "barriers": ".0f",
    "MFMA": ".2f",
    "FMA/thread": ".0f",
}


@dataclass(frozen=True)
class Shapes:
    """The sizes of a full layer with routed experts; the defaults are GLM-5.2's."""

    hidden: int = 6144
    q_rank: int = 2048
    rank: int = 512
    rope: int = 64
    nope: int = 192
    values: int = 256
    heads: int = 64
    index_heads: int = 32
    index_dim: int = 128
    selected: int = 2048
    experts: int = 256
    top_k: int = 8
    intermediate: int = 2048
    context: int = 4096


PROMPT = 20  # tokens, more than the blocks of a decode step take
SMALL = Shapes(
    hidden=512, q_rank=256, nope=64, values=64, heads=16, index_heads=8, selected=128, experts=32,
    top_k=4, intermediate=256, context=384,
)  # fmt: skip


class Stage(NamedTuple):
    """A part of a layer: what gives its arrays, and the multiply-adds of each of its launches.

    A launch without such, None, is left out; of a stage of a prompt they are not known.
    """

    run: Callable[[], Any]
    products: list[int | None] | None = None


class Layer:
    """A full layer with routed experts, the cache of a context, and a token."""

    def __init__(self, shapes: Shapes, fmt: str = "affine4", kv_format: str = "bf16") -> None:
        self.bits, self.shapes, self.fmt, self.kv_format = Bits(0), shapes, FORMATS[fmt], kv_format
        self.x = self.floats(1, 1, shapes.hidden)

    def floats(self, *shape: int) -> mx.array:
        return self.bits.floats(shape, mx.bfloat16)

    def norm(self, n: int) -> tuple[mx.array, float]:
        return self.floats(n), EPS

    def weight(self, *shape: int) -> Weight:
        return self.bits.weight(shape, self.fmt, mx.bfloat16)

    def dense(self, *shape: int) -> Weight:
        return Weight.dense(self.floats(*shape))

    def mlp(self, intermediate: int, *experts: int) -> tuple[Weight, Weight, Weight]:
        hidden = self.shapes.hidden
        gate, up = (self.weight(*experts, intermediate, hidden) for _ in range(2))
        return gate, up, self.weight(*experts, hidden, intermediate)

    def rows(self, rank: int, rope: int) -> tuple[mx.array, mx.array | None]:
        context = self.shapes.context
        latents, ropes = self.floats(1, context, rank), self.floats(1, context, rope)
        if self.kv_format not in kv_rows.PACKED:
            dtype = kv_rows.FLOATS[self.kv_format]
            return latents.astype(dtype), ropes.astype(dtype) if rope else None
        wide = latents.astype(mx.float32), ropes.astype(mx.float32) if rope else None
        return kv_rows.pack(*wide, self.kv_format), None

    def project(self) -> Stage:
        s = self.shapes
        angles = mx.zeros((2, 1, 1, 1, s.rope // 2))
        full = blocks.IndexerArguments(
            self.weight(s.index_dim, s.hidden), self.norm(s.index_dim), self.floats(s.index_dim),
            self.weight(s.index_heads * s.index_dim, s.q_rank), self.dense(s.index_heads, s.hidden),
            s.index_heads, True, True,
        )  # fmt: skip
        given = (
            self.x, angles[0], angles[1], self.norm(s.hidden), self.weight(s.q_rank, s.hidden),
            self.norm(s.q_rank), self.weight(s.heads * (s.nope + s.rope), s.q_rank),
            self.weight(s.rank + s.rope, s.hidden), self.norm(s.rank),
            self.weight(s.heads, s.rank, s.nope), s.nope,
        )  # fmt: skip
        first = s.q_rank + s.rank + s.rope + s.index_dim + s.index_heads
        second = s.heads * (s.nope + s.rope) + s.index_heads * s.index_dim
        return Stage(
            lambda: blocks.attention_project(*given, full),
            [first * s.hidden, second * s.q_rank, s.heads * s.rank * s.nope],
        )

    def choose(self) -> Stage:
        s = self.shapes
        keys, _ = self.rows(s.index_dim, 0)
        q, weights = self.floats(1, 1, s.index_heads, s.index_dim), mx.ones((1, 1, s.index_heads))
        products = s.context * s.index_heads * (s.index_dim + 1)
        return Stage(
            lambda: ops.indexer_topk(q, keys, weights, s.selected, scale=1.0), [products, 0]
        )

    def attend(self) -> Stage:
        s = self.shapes
        selected = mx.arange(s.selected, dtype=mx.int32) * (s.context // s.selected)
        given = (
            self.x, self.floats(1, 1, s.heads, s.rank + s.rope), *self.rows(s.rank, s.rope),
            selected[None, None], self.weight(s.heads, s.values, s.rank),
            self.weight(s.hidden, s.heads * s.values),
        )  # fmt: skip
        return Stage(
            lambda: blocks.attend(*given, rank=s.rank, scale=0.0625),
            [
                s.heads * s.selected * (2 * s.rank + s.rope),
                s.heads * s.rank * (s.selected // 64 + s.values),
                s.hidden * s.heads * s.values,
            ],
        )

    def mix(self, experts: int, intermediate: int, *products: int | None) -> Stage:
        s = self.shapes
        router = self.floats(experts, s.hidden).astype(mx.float32)
        bank, shared = self.mlp(intermediate, experts), self.mlp(intermediate)
        given = self.x, self.norm(s.hidden), (router, mx.zeros(experts)), bank, shared
        return Stage(
            lambda: blocks.moe_block(*given, top_k=s.top_k, **ROUTING),  # type: ignore[arg-type]
            [*products],
        )

    def route(self) -> Stage:
        """Among all experts, which are cut short: their own launches do not count."""
        s = self.shapes
        return self.mix(s.experts, 64, s.experts * s.hidden, 0, None, None)

    def mlps(self) -> Stage:
        """Of those that the token takes, which are a whole bank."""
        s = self.shapes
        taken = (s.top_k + 1) * s.intermediate * s.hidden
        return self.mix(s.top_k, s.intermediate, None, None, 2 * taken, taken)

    def stages(self) -> dict[str, Callable[[], Stage]]:
        """What makes the stages of a token, by name; each holds weights of its own."""
        return {
            "project": self.project,
            "choose": self.choose,
            "attend": self.attend,
            "route": self.route,
            "experts": self.mlps,
        }

    def choose_of_prompt(self) -> Stage:
        s = self.shapes
        keys, _ = self.rows(s.index_dim, 0)
        q = self.floats(1, PROMPT, s.index_heads, s.index_dim)
        weights = mx.ones((1, PROMPT, s.index_heads))
        return Stage(lambda: ops.indexer_topk(q, keys, weights, s.selected, scale=1.0))

    def attend_of_prompt(self) -> Stage:
        s = self.shapes
        q = self.floats(1, PROMPT, s.heads, s.rank + s.rope)
        rows = self.rows(s.rank, s.rope)
        taken = self.bits.choices(PROMPT, s.selected, s.context - PROMPT)
        selected = mx.sort(mx.array(taken)[None], axis=-1)
        return Stage(lambda: ops.sparse_mla_decode(q, *rows, selected, rank=s.rank, scale=0.0625))

    def experts_of_prompt(self) -> Stage:
        """Of a model whose weights MLX's own kernels take, none are launches of this package."""
        s = self.shapes
        x, bank = self.floats(PROMPT, s.hidden), self.mlp(s.intermediate, s.experts)
        slots = mx.array(self.bits.choices(PROMPT, s.top_k, s.experts))
        scores = mx.ones((PROMPT, s.top_k))
        return Stage(lambda: ops.moe_decode(x, *bank, slots, scores))

    def stages_of_prompt(self) -> dict[str, Callable[[], Stage]]:
        """What makes the stages of `PROMPT` tokens at once, the context's last."""
        return {
            "choose": self.choose_of_prompt,
            "attend": self.attend_of_prompt,
            "experts": self.experts_of_prompt,
        }


class Launch(NamedTuple):
    """A launch of a stage, as the simulator saw it, and its multiply-adds where they are known."""

    name: str
    seen: Any
    products: int | None


def launches(stage: Stage) -> Iterator[Launch]:
    """The launches of a stage, but those that it leaves out."""
    metal_sim.take_launches()
    with metal_sim.simulated(trace=True):
        mx.eval(stage.run())
    found = metal_sim.take_launches()
    products = [0] * len(found) if stage.products is None else stage.products
    for launch, fma in zip(found, products, strict=True):
        if fma is not None:
            name = launch.kernel.removeprefix("glm_fused_").partition("_bfloat16")[0]
            yield Launch(name, launch.report, None if stage.products is None else fma)


def recorded() -> dict[str, list[dict[str, Any]]]:
    """What metal.json holds: the launches of each stage of a small layer, with their bytes."""
    found = {}
    for kv_format in ("bf16", "fp8", "int8"):
        layer = Layer(SMALL, kv_format=kv_format)
        for of, stages in (("token", layer.stages()), ("prompt", layer.stages_of_prompt())):
            for name, make in stages.items():
                if kv_format == "bf16" or name in ("choose", "attend"):  # others read no rows
                    found[f"{of}, {name}, {kv_format} rows"] = [*map(counts, launches(make()))]
    return found


def counts(launch: Launch) -> dict[str, Any]:
    """What is recorded of a launch; bytes are those of device memory."""
    seen, own = launch.seen, launch.seen.traffic.values()
    return {
        "launch": launch.name,
        "threadgroups": seen.threadgroups,
        "threads": seen.threads,
        "requested": sum(t.read for t in own),
        "unique": sum(t.unique_read for t in own),
        "written": sum(t.written for t in own),
        "unique_written": sum(t.unique_written for t in own),
    }


def row(stage: str, launch: Launch) -> dict[str, Any]:
    """The launch as a line of the table."""
    seen, known = launch.seen, counts(launch)
    products = launch.products or 0
    return {
        "stage": stage,
        "launch": launch.name,
        "threadgroups": seen.threadgroups,
        "threads": seen.threads // seen.threadgroups,
        "tg bytes": seen.threadgroup_bytes,
        "read MB": known["unique"] / 1e6,
        "all reads MB": known["requested"] / 1e6,
        "tg read MB": seen.threadgroup_read / 1e6,
        "tg written MB": seen.threadgroup_written / 1e6,
        "barriers": seen.barriers / seen.threadgroups,
        "MFMA": products / 1e6,
        "FMA/thread": products / seen.threads,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns."""
    cells = [[format(row[key], spec) for key, spec in COLUMNS.items()] for row in rows]
    lines = [list(COLUMNS), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )


def main() -> None:
    arguments = argparse.ArgumentParser(
        prog="python -m tests.counts.metal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--format", choices=list(FORMATS), default="affine4", help="of weights")
    arguments.add_argument(
        "--kv-format", choices=[*kv_rows.FLOATS, *kv_rows.PACKED], default="bf16", help="of rows"
    )
    arguments.add_argument("--context", type=int, default=4096, help="cached tokens")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args()
    mx.set_default_device(mx.cpu)
    layer = Layer(Shapes(context=options.context), options.format, options.kv_format)
    rows = [
        row(name, launch) for name, make in layer.stages().items() for launch in launches(make())
    ]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
