"""What the benchmarks and the self-test measure: a GLM layer's routed experts, and bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .. import _ext, ops
from ..formats.weights import Format, Weight
from ..host import to_numpy
from ..ops import stock
from .synthetic import Bits

# The formats whose groups have MLX's default size, and a dense one.
BENCHED = (
    *("affine2", "affine3", "affine4", "affine5", "affine6", "affine8"),
    *("mxfp4", "mxfp8", "nvfp4", "bf16"),
)


def nbytes(w: Weight) -> int:
    """The bytes of all planes of a weight."""
    return sum(plane.nbytes for plane in w.planes)


def seconds(call: Callable[[], mx.array | Sequence[mx.array]]) -> float:
    """The wall time, in seconds, of one call and its evaluation."""
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start


class Yardsticks:
    """Memory to measure plain reads of: as the system gives it, and in huge pages."""

    def __init__(self, size: int = 512 << 20) -> None:
        self.given = mx.ones((size // 4,), mx.float32)
        self.huge = mx.ones((size // 4,), mx.float32)
        mx.eval(self.given, self.huge)
        self.moved = _ext.move_to_huge_pages(self.huge) > 0


def read_bandwidth(a: mx.array) -> float:
    """The GB/s of plain streaming reads of `a` on the default device.

    The CPU reads with the kernels' own threads, a GPU by MLX's reduction.
    """
    times = 1
    start = time.perf_counter()
    if mx.default_device() == mx.gpu:
        times = 4  # so that starting the first is a small part
        mx.eval([mx.max(a) for _ in range(times)])
    else:
        _ext.stream_read(a)
    return times * a.nbytes / (time.perf_counter() - start) / 1e9


def _weight(bits: Bits, shape: tuple[int, ...], fmt: Format) -> Weight:
    """`Bits.weight` [..., n, k], whose mxfp8 codes are those of weights that have been quantized.

    One in eight of the random ones would be subnormal, of these one in ten thousand, and products
    with subnormal floats take a processor longer.
    """
    made = bits.weight(shape, fmt, mx.bfloat16)
    if fmt.mode != "mxfp8":
        return made
    normal = mx.random.normal((1024, 1024), key=mx.random.key(0))
    codes = to_numpy(mx.quantize(normal, mode="mxfp8")[0])
    # They are some 2 ** 7 times as large.
    return Weight((mx.array(np.resize(codes, made.planes[0].shape)), made.planes[1] - 7), fmt)


class RoutedExperts:
    """A bank of experts of one format, and the routing of successive calls.

    A bank far larger than the caches makes every call read memory. It lies as a loaded model's
    weights do, in huge pages where the system lets.
    """

    def __init__(
        self,
        fmt: Format,
        dtype: mx.Dtype = mx.bfloat16,
        *,
        tokens: int = 1,
        top_k: int = 8,
        hidden: int = 6144,
        intermediate: int = 2048,
        bank: int = 16,
    ) -> None:
        bits = Bits(0)
        self.bank, self.top_k, self.bits = bank, top_k, bits
        self.gate = _weight(bits, (bank, intermediate, hidden), fmt)
        self.up = _weight(bits, (bank, intermediate, hidden), fmt)
        self.down = _weight(bits, (bank, hidden, intermediate), fmt)
        self.x = bits.floats((tokens, hidden), dtype)
        mx.eval(self.x, self.gate, self.up, self.down)
        if mx.default_device() == mx.cpu:
            for plane in (*self.gate.planes, *self.up.planes, *self.down.planes):
                _ext.move_to_huge_pages(plane)

    def route(self, top_k: int | None = None) -> tuple[mx.array, mx.array]:
        """Random slots int32 and scores float32 [tokens, top_k], evaluated."""
        shape = (self.x.shape[0], top_k or self.top_k)
        slots = mx.array(self.bits.choices(*shape, of=self.bank))
        scores = mx.abs(self.bits.floats(shape, mx.float32, -2, spread=1))
        mx.eval(slots, scores)
        return slots, scores

    @property
    def expert_bytes(self) -> float:
        """The bytes of one expert's weights."""
        return sum(nbytes(w) for w in (self.gate, self.up, self.down)) / self.bank

    def fused(self, slots: mx.array, scores: mx.array, reference: bool = False) -> mx.array:
        """The sum [tokens, hidden] of each token's experts by `ops.moe_decode`."""
        return ops.moe_decode(
            self.x, self.gate, self.up, self.down, slots, scores, reference=reference
        )

    def stock(self, slots: mx.array, scores: mx.array) -> mx.array:
        """The same sum by MLX's own ops alone."""
        rows = self.x[:, None, None, :]
        gate = stock.gather(rows, self.gate, slots)
        act = gate * mx.sigmoid(gate) * stock.gather(rows, self.up, slots)
        y = stock.gather(act, self.down, slots).squeeze(-2)
        return (y * scores[..., None]).sum(axis=-2).astype(self.x.dtype)
