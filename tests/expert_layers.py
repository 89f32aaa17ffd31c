"""Random expert layers, and moe_decode on them by the simulated host and by the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from formats_under_test import DTYPES, NAN, random_weight
from metal_backend import cpu, metal

from glm_fused import ops
from glm_fused.formats.weights import quantized_format
from glm_fused.ops import metal_sim

Format = tuple[str, int, int]


@dataclass(frozen=True)
class Case:
    """One layer; `used` slots lie between two that hold NaN."""

    dtype: str = "bfloat16"
    gate: Format = ("affine", 4, 64)
    up: Format = ("affine", 4, 64)
    down: Format = ("affine", 4, 64)
    tokens: int = 1
    top_k: int = 2
    hidden: int = 512
    intermediate: int = 512
    used: int = 3
    seed: int = 0
    rows: int = 4
    simdgroups: tuple[int, int] = (2, 8)  # moe_gate_up's and moe_down_sum's

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        return self.rows, *self.simdgroups, 32


def to_numpy(a: mx.array) -> np.ndarray:
    """The array's values; for bfloat16 its bits as uint16."""
    if a.dtype == mx.bfloat16:
        return np.array(a.view(mx.uint16))
    return np.array(a)


def to_mlx(a: np.ndarray, dtype: str) -> mx.array:
    return mx.array(a).view(DTYPES[dtype]) if dtype == "bfloat16" else mx.array(a)


@dataclass
class Layer:
    case: Case
    x: mx.array
    gate: ops.Weight
    up: ops.Weight
    down: ops.Weight
    slots: np.ndarray
    scores: np.ndarray
    reports: list[Any] = field(default_factory=list)

    def moe(self) -> mx.array:
        # Slots are not evaluated yet, as a router's are not, so that bad ones reach the kernel.
        slots = mx.array(self.slots) + 0
        return ops.moe_decode(self.x, self.gate, self.up, self.down, slots, mx.array(self.scores))


def _with_unused(w: ops.Weight) -> ops.Weight:
    """`w` with a slot of NaN before and after its slots."""

    def pad(a: mx.array) -> mx.array:
        edge = mx.full((1, *a.shape[1:]), NAN.get(a.dtype, float("nan")), a.dtype)
        return mx.concatenate([edge, a, edge])

    return w._replace(planes=[pad(plane) for plane in w.planes])


def make_layer(c: Case, slots: np.ndarray | None = None, pad: bool = True) -> Layer:
    rng = np.random.default_rng([c.seed, c.tokens, c.hidden, c.intermediate])
    dtype = DTYPES[c.dtype]
    x = mx.array(rng.standard_normal((c.tokens, c.hidden), dtype=np.float32)).astype(dtype)

    def weight(n: int, k: int, fmt: Format) -> ops.Weight:
        w = random_weight(rng, (c.used, n, k), fmt, dtype)
        return _with_unused(w) if pad else w

    if slots is None:
        picks = [rng.permutation(c.used)[: c.top_k] for _ in range(c.tokens)]
        slots = np.stack(picks).astype(np.int32) + int(pad)
    return Layer(
        c,
        x,
        weight(c.intermediate, c.hidden, c.gate),
        weight(c.intermediate, c.hidden, c.up),
        weight(c.hidden, c.intermediate, c.down),
        slots,
        rng.random(slots.shape, dtype=np.float32),
    )


def _weight_of_bits(rng: np.random.Generator, shape: tuple[int, ...], fmt: Format, dtype: str):
    """A weight of small numbers, made fast from random bits whose exponents are kept low."""
    mode, bits, group = fmt
    *slots, k = shape

    def masked(kind: str, shape: tuple[int, ...], keep: int, add: int) -> mx.array:
        words = rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
        return mx.array((words & keep | add).astype(kind))

    floats = {
        "float32": ("uint32", 0x807FFFFF, 0x3A000000),
        "float16": ("uint16", 0x83FF, 0x1000),
        "bfloat16": ("uint16", 0x807F, 0x3A00),
    }
    kind, keep, add = floats[dtype]
    if mode == "dense":
        return ops.Weight.dense(masked(kind, shape, keep, add).view(DTYPES[dtype]))
    found = quantized_format(group, bits, mode)
    words = masked("uint32", (*slots, k * bits // 32), 0xB7B7B7B7 if bits == 8 else 2**32 - 1, 0)
    if mode == "affine":
        scales, biases = (
            masked(kind, (*slots, k // group), keep, add).view(DTYPES[dtype]) for _ in range(2)
        )
        return ops.Weight((words, scales, biases), found)
    scales = masked("uint8", (*slots, k // group), 3, 0x18 if mode == "nvfp4" else 120)
    return ops.Weight((words, scales), found)


def make_layer_of_bits(c: Case) -> Layer:
    """A layer of GLM's size, made in a moment; one token takes every slot."""
    rng = np.random.default_rng(c.seed)
    x = mx.array(rng.standard_normal((c.tokens, c.hidden), dtype=np.float32))
    slots = np.tile(rng.permutation(c.used)[: c.top_k].astype(np.int32), (c.tokens, 1))
    up, down = (c.used, c.intermediate, c.hidden), (c.used, c.hidden, c.intermediate)
    return Layer(
        c,
        x.astype(DTYPES[c.dtype]),
        _weight_of_bits(rng, up, c.gate, c.dtype),
        _weight_of_bits(rng, up, c.up, c.dtype),
        _weight_of_bits(rng, down, c.down, c.dtype),
        slots,
        rng.random(slots.shape, dtype=np.float32),
    )


def run_fused(layer: Layer, **settings: Any) -> np.ndarray:
    """The bits of y by the simulated host, which takes `settings`.

    The reports of its two launches are left in the layer.
    """
    with metal(tiles=layer.case.tiles, **settings):
        y = layer.moe()
        mx.eval(y)
    layer.reports = [launch.report for launch in metal_sim.take_launches()]
    assert len(layer.reports) == 2
    return to_numpy(y)


def run_cpu(layer: Layer) -> np.ndarray:
    """The bits of y by the CPU."""
    with cpu():
        return to_numpy(layer.moe())


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """Fail unless the arrays are equal bit for bit."""
    unsigned = {2: np.uint16, 4: np.uint32}[a.itemsize]
    different = np.argwhere(a.view(unsigned) != b.view(unsigned))
    assert a.shape == b.shape
    assert len(different) == 0, f"{len(different)} of {a.size} differ, first {different[0]}"
