"""MLX's own kernels, unmodified, are close to float64 on the simulator."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sim
from sim_support import DTYPES, TOLERANCE, Array, bits, empty, error, number, wide

HEADERS = "\n".join(
    f'#include "mlx/backend/metal/kernels/{name}.h"'
    for name in ("utils", "steel/gemm/gemm", "quantized_utils")
)
AFFINE = f"""{HEADERS}
#include "mlx/backend/metal/kernels/quantized.h"
#define KERNELS(T)                                                    \\
  instantiate_kernel("qmv_fast_" #T, affine_qmv_fast, T, 64, 4, 0)    \\
  instantiate_kernel("qmv_" #T, affine_qmv, T, 64, 4, 0)              \\
  instantiate_kernel("gather_fast_" #T, affine_gather_qmv_fast, T, 64, 4) \\
  instantiate_kernel("gather_" #T, affine_gather_qmv, T, 64, 4)       \\
  instantiate_kernel("qmm_t_" #T, affine_qmm_t, T, 64, 4, true, 0)
KERNELS(float) KERNELS(bfloat16_t)
instantiate_kernel("qmv_fast_6_float16_t", affine_qmv_fast, float16_t, 32, 6, 0)
"""
FLOATING = f"""{HEADERS}
#include "mlx/backend/metal/kernels/fp_quantized.h"
instantiate_kernel("mxfp4", fp_qmv_fast, float, 32, 4, 0)
instantiate_kernel("mxfp8", fp_qmv_fast, bfloat16_t, 32, 8, 0)
instantiate_kernel("nvfp4", fp_qmv_fast, bfloat16_t, 16, 4, 0)
"""


@pytest.fixture(scope="module")
def affine() -> sim.Library:
    return sim.compile(AFFINE, include_dirs=[sim.mlx_include()])


@pytest.fixture(scope="module")
def floating() -> sim.Library:
    return sim.compile(FLOATING, include_dirs=[sim.mlx_include()])


def quantized(shape: tuple[int, ...], dtype: str, **how: Any) -> tuple[list[mx.array], Array]:
    """Packed weights with their scales (and biases), and what they stand for in float64."""
    weight = mx.random.normal(shape, key=mx.random.key(1)).astype(DTYPES[dtype])
    w, *rest = mx.quantize(weight, **how)
    exact = [a if a.dtype == mx.uint8 else a.astype(mx.float32) for a in rest]
    return [w, *rest], wide(mx.dequantize(w, *exact, **how, dtype=mx.float32))


def normal(shape: tuple[int, ...], dtype: str, key: int = 2) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key)).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float", "bfloat16_t"])
@pytest.mark.parametrize(("kernel", "n", "k"), [("qmv_fast", 64, 1024), ("qmv", 37, 576)])
def test_affine_matvec(affine: sim.Library, kernel: str, n: int, k: int, dtype: str) -> None:
    packed, weight = quantized((n, k), dtype, group_size=64, bits=4)
    x, y = normal((k,), dtype), empty((n,), dtype)
    arrays = [*map(bits, packed), bits(x), y, number(k), number(n)]
    report = affine.run(
        f"{kernel}_{dtype}",
        grid=(1, -(-n // 8), 1),
        threadgroup=(32, 2, 1),
        buffers=dict(enumerate(arrays)),
    )
    assert report.clean, report
    assert error(wide(y, dtype), weight @ wide(x)) < TOLERANCE[dtype]


def test_six_bits_and_half(affine: sim.Library) -> None:
    packed, weight = quantized((32, 512), "float16_t", group_size=32, bits=6)
    x, y = normal((512,), "float16_t"), empty((32,), "float16_t")
    arrays = [*map(bits, packed), bits(x), y, number(512), number(32)]
    affine.run(
        "qmv_fast_6_float16_t",
        grid=(1, 4, 1),
        threadgroup=(32, 2, 1),
        buffers=dict(enumerate(arrays)),
    )
    assert error(wide(y), weight @ wide(x)) < TOLERANCE["float16_t"]


@pytest.mark.parametrize("dtype", ["float", "bfloat16_t"])
@pytest.mark.parametrize(("kernel", "n", "k"), [("gather_fast", 32, 512), ("gather", 20, 192)])
def test_gathered_matvec(affine: sim.Library, kernel: str, n: int, k: int, dtype: str) -> None:
    experts, tokens = 4, 3
    packed, weight = quantized((experts, n, k), dtype, group_size=64, bits=4)
    x = normal((tokens, 1, k), dtype)
    left = np.arange(2 * tokens, dtype=np.uint32) // 2
    right = np.array([3, 0, 1, 1, 2, 3], np.uint32)
    y = empty((2 * tokens, 1, n), dtype)
    strides = [np.array([n * k // d, k // d, 1], np.int64) for d in (8, 64, 64)]
    arrays = [
        *[*map(bits, packed), bits(x), left, right, y, number(k), number(n)],
        *[number(1), np.array(x.shape, np.int32), np.array([k, k, 1], np.int64)],
        *[number(1), np.array(packed[0].shape, np.int32), *strides],
        *[number(1), number(2 * tokens), number(1, "int64"), number(1, "int64")],
    ]
    report = affine.run(
        f"{kernel}_{dtype}",
        grid=(1, -(-n // 8), 2 * tokens),
        threadgroup=(32, 2, 1),
        buffers=dict(enumerate(arrays)),
    )
    assert report.clean, report
    expected = np.einsum("rnk,rmk->rmn", weight[right], wide(x)[left])
    assert error(wide(y, dtype), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float", "bfloat16_t"])
def test_matmul_by_simdgroup_matrices(affine: sim.Library, dtype: str) -> None:
    m, n, k = 40, 64, 128
    packed, weight = quantized((n, k), dtype, group_size=64, bits=4)
    x, y = normal((m, k), dtype), empty((m, n), dtype)
    arrays = [*map(bits, packed), bits(x), y, number(k), number(n), number(m)]
    report = affine.run(
        f"qmm_t_{dtype}",
        grid=(n // 32, -(-m // 32), 1),
        threadgroup=(32, 2, 2),
        buffers=dict(enumerate(arrays)),
    )
    assert report.clean, report
    assert error(wide(y, dtype), wide(x) @ weight.T) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("mode", "dtype"), [("mxfp4", "float"), ("mxfp8", "bfloat16_t"), ("nvfp4", "bfloat16_t")]
)
def test_floating_point_weights(floating: sim.Library, mode: str, dtype: str) -> None:
    n, k = 64, 1024
    (w, scales), weight = quantized((n, k), dtype, mode=mode)
    x, y = normal((k,), dtype), empty((n,), dtype)
    report = floating.run(
        mode,
        grid=(1, n // 8, 1),
        threadgroup=(32, 2, 1),
        buffers={0: bits(w), 1: bits(scales), 3: bits(x), 4: y, 5: number(k), 6: number(n)},
    )
    assert report.clean, report
    assert error(wide(y, dtype), weight @ wide(x)) < TOLERANCE[dtype]


def test_contraction_changes_roundings_only(affine: sim.Library) -> None:
    fused = sim.compile(AFFINE, include_dirs=[sim.mlx_include()], contract=True)
    packed, weight = quantized((64, 1024), "float", group_size=64, bits=4)
    x = normal((1024,), "float")
    results = []
    for library in (affine, fused):
        y = empty((64,), "float")
        arrays = [*map(bits, packed), bits(x), y, number(1024), number(64)]
        library.run(
            "qmv_fast_float",
            grid=(1, 8, 1),
            threadgroup=(32, 2, 1),
            buffers=dict(enumerate(arrays)),
        )
        assert error(wide(y), weight @ wide(x)) < TOLERANCE["float"]
        results.append(y)
    assert (results[0] != results[1]).any()


def test_schedules_and_workers_agree(affine: sim.Library) -> None:
    packed, _ = quantized((64, 1024), "bfloat16_t", group_size=64, bits=4)
    x = bits(normal((1024,), "bfloat16_t"))
    results = []
    for how in ({}, {"seed": 0}, {"seed": 7}, {"threads": 2}, {"in_place": True}):
        y = empty((64,), "bfloat16_t")
        arrays = [*map(bits, packed), x, y, number(1024), number(64)]
        affine.run(
            "qmv_fast_bfloat16_t",
            grid=(1, 8, 1),
            threadgroup=(32, 2, 1),
            buffers=dict(enumerate(arrays)),
            **how,
        )
        results.append(y.tobytes())
    assert len(set(results)) == 1
