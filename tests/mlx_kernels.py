"""Runs, in the simulator, the chain of MLX's own kernels that the experts' shaders equal."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sim
from expert_layers import Case, Format, Layer, to_mlx, to_numpy
from formats_under_test import DTYPES
from metal_backend import COMPILERS, metal

from glm_fused import ops

if sys.platform != "linux":
    pytest.skip("the simulator runs on Linux only", allow_module_level=True)

METAL_TYPES = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}
_KERNELS = "mlx/backend/metal/kernels/"
_HEADERS = {
    "affine": ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"),
    "fp": ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h"),
    "gemv": ("utils.h", "gemv.h"),
}


def fast(fmt: Format, n: int, k: int) -> bool:
    return fmt[0] != "dense" and n % 8 == 0 and k % 512 == 0


def host_name(function: str) -> str:
    return "mlx_" + re.sub("[^0-9A-Za-z]", "_", function)


def instance(function: str) -> str:
    """The line that makes a template's instance."""
    name = host_name(function)
    return f'template [[host_name("{name}")]] [[kernel]] decltype({function}) {function};\n'


def mlx_function(fmt: Format, dtype: str, n: int, k: int) -> str:
    mode, bits, group = fmt
    t, suffix = METAL_TYPES[dtype], "_fast" if fast(fmt, n, k) else ""
    if mode == "dense":
        return f"gemv_gather<{t}, 4, 1, 1, 32, {4 if n >= 4 else 1}, 4>"
    name = "affine" if mode == "affine" else "fp"
    return f"{name}_gather_qmv{suffix}<{t}, {group}, {bits}>"


class Libraries:
    """MLX's kernels for the cases, with those of a family, a type and a mode in one library."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self.cases = list(cases)

    @functools.cache  # noqa: B019
    def _started(self, family: str, dtype: str, contract: bool) -> Future[Any]:
        functions = []
        for c in self.cases:
            for fmt in (c.gate, c.up):
                functions.append(mlx_function(fmt, c.dtype, c.intermediate, c.hidden))
            functions.append(mlx_function(c.down, c.dtype, c.hidden, c.intermediate))
        text = "".join(f'#include "{_KERNELS}{h}"\n' for h in _HEADERS[family])
        wanted = {f for f in functions if f.startswith(family) and f"<{METAL_TYPES[dtype]}," in f}
        text += "".join(map(instance, sorted(wanted)))
        include = (sim.mlx_include(),)
        return COMPILERS.submit(sim.compile, text, include_dirs=include, contract=contract)

    def mlx(self, family: str, dtype: str, contract: bool) -> Any:
        return self._started(family, dtype, contract).result()

    def prepare(self, case: Case, contract: bool) -> None:
        """Begin to compile what the chain of a case runs on."""
        families = {"dense": "gemv", "affine": "affine"}
        for family in {families.get(f[0], "fp") for f in (case.gate, case.up, case.down)}:
            self._started(family, case.dtype, contract)


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of NaN."""
    return to_numpy(mx.full(shape, float("nan"), DTYPES[dtype])).copy()


def _i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def gather_matvec(
    libs: Libraries, w: ops.Weight, fmt: Format, dtype: str, x: np.ndarray, lhs: np.ndarray,
    rhs: np.ndarray, contract: bool,
) -> np.ndarray:  # fmt: skip
    """Run MLX's gather_qmm or gather_mm on single rows: out[i] = W[rhs[i]] x[lhs[i]]."""
    weight, *scaling = (to_numpy(plane) for plane in w.planes)
    bank, n, _ = weight.shape
    k, count = x.shape[1], len(rhs)
    name = mlx_function(fmt, dtype, n, k)
    out = empty((count, n), dtype)
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
    scales, *biases = scaling
    batch = {
        9: _i32(1), 10: _i32(x.shape[0], 1, k), 11: _i64(k, k, 1), 12: _i32(1),
        13: _i32(*weight.shape), 14: _i64(weight[0].size, weight.shape[2], 1),
        15: _i64(scales[0].size, scales.shape[2], 1),
    }  # fmt: skip
    indices = [_i32(1), _i32(count), _i64(1), _i64(1)]
    strides = [_i64(scales[0].size, scales.shape[2], 1) for _ in biases]
    buffers = {0: weight, 1: scales, 3: x, 4: lhs, 5: rhs, 6: out, 7: _i32(k), 8: _i32(n)}
    buffers |= dict(enumerate(biases, 2)) | batch | dict(enumerate(strides + indices, 16))
    lib = libs.mlx("affine" if biases else "fp", dtype, contract)
    lib.run(host_name(name), grid=(1, -(-n // 8), count), threadgroup=(32, 2, 1), buffers=buffers)
    return out


def run_chain(libs: Libraries, layer: Layer, contract: bool) -> np.ndarray:
    """The bits of y from MLX's unmodified kernels, one launch per step, with our swiglu between."""
    c = layer.case
    rhs = layer.slots.reshape(-1).astype(np.uint32)
    pairs = np.arange(len(rhs), dtype=np.uint32)
    token = pairs // c.top_k
    x = to_numpy(layer.x)
    gate = gather_matvec(libs, layer.gate, c.gate, c.dtype, x, token, rhs, contract)
    up = gather_matvec(libs, layer.up, c.up, c.dtype, x, token, rhs, contract)
    with metal(contract=contract):
        act = to_numpy(ops.swiglu(to_mlx(gate, c.dtype), to_mlx(up, c.dtype)))
    y = gather_matvec(libs, layer.down, c.down, c.dtype, act, pairs, rhs, contract)
    wide = np.array(to_mlx(y, c.dtype).astype(mx.float32)).reshape(c.tokens, c.top_k, c.hidden)
    total = np.zeros((c.tokens, c.hidden), np.float32)
    for choice in range(c.top_k):
        total = total + wide[:, choice] * layer.scores[:, choice, None]
    return to_numpy(mx.array(total).astype(DTYPES[c.dtype]))
