"""Runs the shaders in the simulator, and beside them the chain of MLX's own kernels they equal."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sim
from formats_under_test import DTYPES, random_weight

from glm_fused import ops

if sys.platform != "linux":
    pytest.skip("the simulator runs on Linux only", allow_module_level=True)

Format = tuple[str, int, int]
SHADERS = Path(__file__).parent.parent / "metal"
METAL_TYPES = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}


def _load_flatten() -> Any:
    spec = importlib.util.spec_from_file_location("flatten", SHADERS / "flatten.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flatten = _load_flatten()


@functools.cache
def shader(name: str) -> str:
    return flatten.flatten(name, sim.mlx_include())


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
    simdgroups: tuple[int, int] = (2, 8)


def fast(fmt: Format, n: int, k: int) -> bool:
    return fmt[0] != "dense" and n % 8 == 0 and k % 512 == 0


def metal_format(fmt: Format, dtype: str, n: int, k: int) -> str:
    mode, bits, group = fmt
    if mode == "dense":
        return f"Dense<{METAL_TYPES[dtype]}>"
    order = "true" if fast(fmt, n, k) else "false"
    if mode == "affine":
        return f"Affine<{METAL_TYPES[dtype]}, {group}, {bits}, {order}>"
    return f"Fp<{group}, {bits}, {order}>"


def shared_vectors(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


def host_name(function: str) -> str:
    return "glm_fused_" + re.sub("[^0-9A-Za-z]", "_", function)


def instance(function: str) -> str:
    """The line that makes a template instance, as the host writes it."""
    name = host_name(function)
    return f'template [[host_name("{name}")]] [[kernel]] decltype({function}) {function};\n'


def fused_functions(c: Case) -> tuple[str, str]:
    t, most = METAL_TYPES[c.dtype], shared_vectors(c.tokens)
    gate = metal_format(c.gate, c.dtype, c.intermediate, c.hidden)
    up = metal_format(c.up, c.dtype, c.intermediate, c.hidden)
    down = metal_format(c.down, c.dtype, c.hidden, c.intermediate)
    return (
        f"moe_gate_up<{t}, {gate}, {up}, {c.rows}, {most}>",
        f"moe_down_sum<{t}, {down}, {c.rows}, {most}>",
    )


def mlx_function(fmt: Format, dtype: str, n: int, k: int) -> str:
    mode, bits, group = fmt
    t, suffix = METAL_TYPES[dtype], "_fast" if fast(fmt, n, k) else ""
    if mode == "dense":
        return f"gemv_gather<{t}, 4, 1, 1, 32, {4 if n >= 4 else 1}, 4>"
    name = "affine" if mode == "affine" else "fp"
    return f"{name}_gather_qmv{suffix}<{t}, {group}, {bits}>"


_CHAIN_SWIGLU = """
template <typename T>
[[kernel]] void chain_swiglu(
    const device T* gate [[buffer(0)]],
    const device T* up [[buffer(1)]],
    device T* act [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  act[i] = static_cast<T>(
      glm_fused::swiglu(gate[i], up[i], glm_fused::As<T>()));
}
"""
_KERNELS = "mlx/backend/metal/kernels/"
_MLX_HEADERS = {
    "affine": ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"),
    "fp": ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h"),
    "gemv": ("utils.h", "gemv.h"),
}


class Libraries:
    """One library per source file, contraction mode and tracing, with all instances asked for."""

    def __init__(self, cases: Iterable[Case]):
        self.cases = list(cases)

    def _compile(self, text: str, functions: Iterable[str], **mode: bool) -> Any:
        lines = "".join(instance(f) for f in sorted(set(functions)))
        return sim.compile(text + lines, include_dirs=(sim.mlx_include(),), **mode)

    @functools.cache  # noqa: B019
    def fused(self, dtype: str, contract: bool, trace: bool) -> Any:
        functions = [f for c in self.cases if c.dtype == dtype for f in fused_functions(c)]
        return self._compile(shader("moe_decode"), functions, contract=contract, trace=trace)

    @functools.cache  # noqa: B019
    def mlx(self, family: str, dtype: str, contract: bool) -> Any:
        functions = []
        for c in self.cases:
            for fmt in (c.gate, c.up):
                functions.append(mlx_function(fmt, c.dtype, c.intermediate, c.hidden))
            functions.append(mlx_function(c.down, c.dtype, c.hidden, c.intermediate))
        text = "".join(f'#include "{_KERNELS}{h}"\n' for h in _MLX_HEADERS[family])
        wanted = [f for f in functions if f.startswith(family) and f"<{METAL_TYPES[dtype]}," in f]
        return self._compile(text, wanted, contract=contract)

    def prepare(self, case: Case, contract: bool) -> None:
        """Compile what a case and its chain run on, two at a time."""
        families = {"dense": "gemv", "affine": "affine"}
        used = {families.get(f[0], "fp") for f in (case.gate, case.up, case.down)}
        with ThreadPoolExecutor(2) as compilers:
            started = [compilers.submit(self.fused, case.dtype, contract, False)]
            started += [compilers.submit(self.mlx, f, case.dtype, contract) for f in used]
            started.append(compilers.submit(self.swiglu, contract))
        for library in started:
            library.result()

    @functools.cache  # noqa: B019
    def swiglu(self, contract: bool) -> Any:
        text = flatten.flatten("router_topk", sim.mlx_include()) + _CHAIN_SWIGLU
        functions = [f"chain_swiglu<{t}>" for t in METAL_TYPES.values()]
        return self._compile(text, functions, contract=contract)


def to_numpy(a: mx.array) -> np.ndarray:
    """The array's values; bfloat16 as its bits."""
    if a.dtype == mx.bfloat16:
        return np.array(a.view(mx.uint16))
    return np.array(a)


def to_mlx(a: np.ndarray, dtype: str) -> mx.array:
    return mx.array(a).view(DTYPES[dtype]) if dtype == "bfloat16" else mx.array(a)


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of NaN."""
    return to_numpy(mx.full(shape, float("nan"), DTYPES[dtype])).copy()


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


def _with_unused(w: ops.Weight) -> ops.Weight:
    """A slot of NaN before and after the slots of `w`."""

    def pad(a: mx.array | None) -> mx.array | None:
        if a is None:
            return None
        whole = {mx.uint8: 0xFF, mx.uint32: 0xFFFFFFFF}
        edge = mx.full((1, *a.shape[1:]), whole.get(a.dtype, float("nan")), a.dtype)
        return mx.concatenate([edge, a, edge])

    return w._replace(weight=pad(w.weight), scales=pad(w.scales), biases=pad(w.biases))


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
    """A weight of small numbers, made fast: random bits whose exponents are kept low."""
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
        return ops.Weight(masked(kind, shape, keep, add).view(DTYPES[dtype]))
    words = masked("uint32", (*slots, k * bits // 32), 0xB7B7B7B7 if bits == 8 else 2**32 - 1, 0)
    if mode == "affine":
        scales, biases = (
            masked(kind, (*slots, k // group), keep, add).view(DTYPES[dtype]) for _ in range(2)
        )
        return ops.Weight(words, scales, biases, group, bits, mode)
    scales = masked("uint8", (*slots, k // group), 3, 0x18 if mode == "nvfp4" else 120)
    return ops.Weight(words, scales, None, group, bits, mode)


def make_layer_of_bits(c: Case) -> Layer:
    """A layer of GLM's size in a moment; one token takes every slot."""
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


def _bind(w: ops.Weight, first: int) -> dict[int, np.ndarray]:
    weight = to_numpy(w.weight)
    scales = weight if w.scales is None else to_numpy(w.scales)
    biases = scales if w.biases is None else to_numpy(w.biases)
    return {first: weight, first + 1: scales, first + 2: biases}


def _i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _params(layer: Layer) -> np.ndarray:
    c = layer.case
    return _i32(c.tokens, c.top_k, c.hidden, c.intermediate, layer.gate.weight.shape[0])


def _threadgroup_bytes(words: int) -> int:
    return -(-4 * words // 16) * 16


def run_gate_up(
    lib: Any, layer: Layer, function: str | None = None, **how: Any
) -> tuple[np.ndarray, Any]:
    """The bits of act [pairs, intermediate], and the launch's report."""
    c = layer.case
    pairs, tile = c.tokens * c.top_k, c.rows * c.simdgroups[0]
    act = empty((pairs, c.intermediate), c.dtype)
    buffers = {0: to_numpy(layer.x), 1: layer.slots, 8: act, 9: _params(layer)}
    report = lib.run(
        host_name(function or fused_functions(c)[0]),
        grid=(-(-c.intermediate // tile), pairs, 1),
        threadgroup=(32, c.simdgroups[0], 1),
        buffers=buffers | _bind(layer.gate, 2) | _bind(layer.up, 5),
        threadgroup_memory={0: _threadgroup_bytes(pairs)},
        **how,
    )
    return act, report


def run_down_sum(
    lib: Any, layer: Layer, act: np.ndarray, function: str | None = None, **how: Any
) -> tuple[np.ndarray, Any]:
    """The bits of y [tokens, hidden], and the launch's report."""
    c = layer.case
    pairs = c.tokens * c.top_k
    y = empty((c.tokens, c.hidden), c.dtype)
    buffers = {0: act, 1: layer.slots, 5: layer.scores, 6: y, 7: _params(layer)}
    report = lib.run(
        host_name(function or fused_functions(c)[1]),
        grid=(-(-c.hidden // c.rows), 1, 1),
        threadgroup=(32, c.simdgroups[1], 1),
        buffers=buffers | _bind(layer.down, 2),
        threadgroup_memory={0: _threadgroup_bytes(pairs), 1: _threadgroup_bytes(pairs * c.rows)},
        **how,
    )
    return y, report


def run_fused(lib: Any, layer: Layer, **how: Any) -> np.ndarray:
    """The bits of y; the two launches' reports are left in the layer."""
    act, first = run_gate_up(lib, layer, **how)
    y, second = run_down_sum(lib, layer, act, **how)
    layer.reports = [first, second]
    return y


def gather_matvec(
    libs: Libraries, w: ops.Weight, fmt: Format, dtype: str, x: np.ndarray, lhs: np.ndarray,
    rhs: np.ndarray, contract: bool,
) -> np.ndarray:  # fmt: skip
    """MLX's gather_qmm or gather_mm of single rows: out[i] = W[rhs[i]] x[lhs[i]]."""
    bank, n, _ = w.weight.shape
    k, count = x.shape[1], len(rhs)
    name = mlx_function(fmt, dtype, n, k)
    out = empty((count, n), dtype)
    weight = to_numpy(w.weight)
    if fmt[0] == "dense":
        rows = 4 * (4 if n >= 4 else 1)
        buffers = {
            0: weight, 1: x, 3: out, 4: _i32(k), 5: _i32(n), 6: _i32(k), 9: _i32(1),
            10: _i32(count), 11: _i64(1, 1), 12: _i32(1), 13: _i32(x.shape[0]), 14: _i64(k),
            15: _i32(1), 16: _i32(bank), 17: _i64(n * k), 18: lhs, 19: rhs,
        }  # fmt: skip
        lib = libs.mlx("gemv", dtype, contract)
        lib.run(
            host_name(name), grid=(-(-n // rows), 1, count), threadgroup=(32, 1, 4), buffers=buffers
        )
        return out
    scales = to_numpy(w.scales)
    batch = {
        9: _i32(1), 10: _i32(x.shape[0], 1, k), 11: _i64(k, k, 1), 12: _i32(1),
        13: _i32(*weight.shape), 14: _i64(weight[0].size, weight.shape[2], 1),
        15: _i64(scales[0].size, scales.shape[2], 1),
    }  # fmt: skip
    indices = [_i32(1), _i32(count), _i64(1), _i64(1)]
    biases = [] if w.biases is None else [_i64(scales[0].size, scales.shape[2], 1)]
    buffers = {0: weight, 1: scales, 3: x, 4: lhs, 5: rhs, 6: out, 7: _i32(k), 8: _i32(n)}
    if w.biases is not None:
        buffers[2] = to_numpy(w.biases)
    buffers |= batch | dict(enumerate(biases + indices, 16))
    lib = libs.mlx("affine" if w.biases is not None else "fp", dtype, contract)
    lib.run(host_name(name), grid=(1, -(-n // 8), count), threadgroup=(32, 2, 1), buffers=buffers)
    return out


def run_chain(libs: Libraries, layer: Layer, contract: bool) -> np.ndarray:
    """The bits of y from MLX's unmodified kernels, one launch per step."""
    c = layer.case
    rhs = layer.slots.reshape(-1).astype(np.uint32)
    pairs = np.arange(len(rhs), dtype=np.uint32)
    token = pairs // c.top_k
    x = to_numpy(layer.x)
    gate = gather_matvec(libs, layer.gate, c.gate, c.dtype, x, token, rhs, contract)
    up = gather_matvec(libs, layer.up, c.up, c.dtype, x, token, rhs, contract)
    act = empty(gate.shape, c.dtype)
    libs.swiglu(contract).run(
        host_name(f"chain_swiglu<{METAL_TYPES[c.dtype]}>"),
        grid=(act.size // 32, 1, 1) if act.size % 32 == 0 else (act.size, 1, 1),
        threadgroup=(32, 1, 1) if act.size % 32 == 0 else (1, 1, 1),
        buffers={0: gate, 1: up, 2: act},
    )
    y = gather_matvec(libs, layer.down, c.down, c.dtype, act, pairs, rhs, contract)
    wide = np.array(to_mlx(y, c.dtype).astype(mx.float32)).reshape(c.tokens, c.top_k, c.hidden)
    total = np.zeros((c.tokens, c.hidden), np.float32)
    for choice in range(c.top_k):
        total = total + wide[:, choice] * layer.scores[:, choice, None]
    return to_numpy(mx.array(total).astype(DTYPES[c.dtype]))


def run_cpu(layer: Layer) -> np.ndarray:
    with mx.stream(mx.cpu):
        y = ops.moe_decode(
            layer.x, layer.gate, layer.up, layer.down, mx.array(layer.slots), mx.array(layer.scores)
        )
    return to_numpy(y)


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bit for bit."""
    unsigned = {2: np.uint16, 4: np.uint32}[a.itemsize]
    different = np.argwhere(a.view(unsigned) != b.view(unsigned))
    assert a.shape == b.shape
    assert len(different) == 0, f"{len(different)} of {a.size} differ, first {different[0]}"
