"""Types, conversions, vectors, simdgroup functions and atomics agree with numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import sim
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sim_support import Array, wide

CONVERSIONS = """
#include <metal_stdlib>
using namespace metal;
kernel void convert(
    device const float* x, device bfloat* b, device float* b_back, device half* h,
    device float* h_back, device const bfloat* p, device const bfloat* q, device bfloat* sums,
    device half* mixed, uint i [[thread_position_in_grid]]) {
  b[i] = bfloat(x[i]);
  b_back[i] = b[i];
  h[i] = static_cast<half>(x[i]);
  h_back[i] = h[i];
  sums[4 * i] = p[i] + q[i];
  sums[4 * i + 1] = p[i] * q[i];
  sums[4 * i + 2] = p[i] * 3;
  sums[4 * i + 3] = i % 2 == 0 ? p[i] : bfloat(2.0f);
  mixed[2 * i] = h[i] + h[i] * half(0.1h);
  mixed[2 * i + 1] = static_cast<half>(b[i]);
}
"""
VECTORS = """
#include <metal_stdlib>
using namespace metal;
struct Params { int2 shape; float4 scale; packed_float3 shift; uchar flag; };
static_assert(sizeof(float3) == 16 && alignof(float3) == 16, "float3");
static_assert(sizeof(Params) == 48, "Params");
static_assert(sizeof(packed_half3) == 6 && sizeof(vec<bfloat, 4>) == 8, "packed");
kernel void vectors(
    device const float4* x, constant Params& params, device float4* out,
    device packed_float3* packed, device bool4* smaller, device uint2* halves,
    uint3 at [[thread_position_in_grid]]) {
  float4 a = x[at.x], swapped = float4(a.zw, a.xy);
  swapped.yz += 1;
  out[3 * at.x] = swapped * params.scale + a.y;
  out[3 * at.x + 1] = params.flag ? a : float4(0);
  out[3 * at.x + 2] = select(a, float4(params.shape.x), a > float4(1.0f));
  packed[at.x] = a.xyz - params.shift;
  smaller[at.x] = a < swapped;
  halves[at.x] = as_type<uint2>(ulong(0x1234567890abcdef));
}
"""
SIMD = """
#include <metal_stdlib>
using namespace metal;
#define N_FLOAT 14
#define N_INT 24
kernel void simd(
    device const float* x [[buffer(0)]], device const int* k [[buffer(1)]],
    device float* f [[buffer(2)]], device int* g [[buffer(3)]],
    uint i [[thread_position_in_threadgroup]], uint n [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint quad [[thread_index_in_quadgroup]]) {
  float v = x[i];
  int w = k[i];
  device float* F = f + i;
  device int* G = g + i;
#define PUT(where, value) { *where = value; where += n; }
  PUT(F, simd_sum(v)) PUT(F, simd_product(v)) PUT(F, simd_max(v)) PUT(F, simd_min(v))
  PUT(F, simd_prefix_inclusive_sum(v)) PUT(F, simd_prefix_exclusive_sum(v))
  PUT(F, simd_shuffle_xor(v, 5)) PUT(F, simd_shuffle_down(v, 3)) PUT(F, simd_shuffle_up(v, 3))
  PUT(F, simd_broadcast(v, 7)) PUT(F, simd_shuffle(v, 31 - lane))
  PUT(F, simd_shuffle_and_fill_up(v, -1.0f, 2)) PUT(F, quad_sum(v)) PUT(F, quad_broadcast(v, 2))
  PUT(G, simd_sum(w)) PUT(G, simd_and(w)) PUT(G, simd_or(w)) PUT(G, simd_xor(w))
  PUT(G, simd_max(w)) PUT(G, simd_min(w)) PUT(G, int(ulong(simd_ballot(w > 0))))
  PUT(G, simd_any(w > 900)) PUT(G, simd_all(w > -1001)) PUT(G, simd_is_first())
  PUT(G, simd_broadcast_first(w)) PUT(G, simd_shuffle_rotate_down(w, 4))
  PUT(G, simd_shuffle_rotate_up(w, 4)) PUT(G, quad_max(w)) PUT(G, quad_shuffle_xor(w, 1))
  PUT(G, simd_shuffle_and_fill_down(w, 5, 2, 8)) PUT(G, simd_prefix_inclusive_product(1 + w % 2))
  PUT(G, int(quad))
}
"""
ATOMICS = """
#include <metal_stdlib>
using namespace metal;
kernel void atomics(
    device atomic_float* sum [[buffer(0)]], device atomic_uint* most [[buffer(1)]],
    device atomic_int* claimed [[buffer(2)]], threadgroup atomic_uint* shared [[threadgroup(0)]],
    device uint* out [[buffer(3)]], uint i [[thread_position_in_grid]],
    uint id [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  if (id == 0) atomic_store_explicit(shared, 0, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(sum, 0.5f, memory_order_relaxed);
  atomic_fetch_max_explicit(most, i * 7 % 31, memory_order_relaxed);
  atomic_fetch_or_explicit(shared, 1u << id, memory_order_relaxed);
  int expected = -1;
  atomic_compare_exchange_weak_explicit(
      claimed, &expected, int(i), memory_order_relaxed, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (id == 0) out[group] = atomic_load_explicit(shared, memory_order_relaxed);
}
"""
MATRIX = """
#include <metal_stdlib>
using namespace metal;
kernel void product(
    device const float* a [[buffer(0)]], device const half* b [[buffer(1)]],
    device float* out [[buffer(2)]]) {
  simdgroup_matrix<float, 8, 8> left, sum(2.0f);
  simdgroup_matrix<half, 8, 8> right;
  simdgroup_load(left, a, 8);
  simdgroup_load(right, b, 10, ulong2(1, 0), true);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, out);
}
"""


@pytest.fixture(scope="module")
def library() -> dict[str, sim.Library]:
    texts = {"convert": CONVERSIONS, "vectors": VECTORS, "simd": SIMD}
    texts |= {"atomics": ATOMICS, "product": MATRIX}
    return {name: sim.compile(text) for name, text in texts.items()}


def bfloat(x: Array) -> Array:
    """float32 values rounded to the nearest bfloat16, as uint16."""
    return np.array(mx.array(x).astype(mx.bfloat16).view(mx.uint16))


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays("u4", 32, elements=st.integers(0, 2**32 - 1)),
    pair=hnp.arrays("u2", (2, 32), elements=st.integers(0, 2**16 - 1)),
)
def test_conversions_and_bfloat_arithmetic(
    library: dict[str, sim.Library], x: Array, pair: Array
) -> None:
    x, n = x.view("f4"), 32
    shapes = [(n, "u2"), (n, "f4"), (n, "f2"), (n, "f4")]
    b, b_back, h, h_back = (np.zeros(*s) for s in shapes)
    sums, mixed = np.zeros((n, 4), "u2"), np.zeros((n, 2), "f2")
    arrays = [x, b, b_back, h, h_back, pair[0], pair[1], sums, mixed]
    library["convert"].run(
        "convert", grid=(1, 1, 1), threadgroup=(n, 1, 1), buffers=dict(enumerate(arrays))
    )
    with np.errstate(all="ignore"):
        p, q = (wide(v, "bfloat16_t").astype("f4") for v in pair)
        chosen = np.where(np.arange(n) % 2 == 0, p, np.float32(2))
        expected = [bfloat(v) for v in (p + q, p * q, p * np.float32(3), chosen)]
        half, tenth = x.astype("f2"), np.float16(0.1)
        same = [
            (b, bfloat(x), "bfloat16_t"),
            (b_back, wide(bfloat(x), "bfloat16_t").astype("f4"), "float"),
            (h, half, "float"),
            (h_back, half.astype("f4"), "float"),
            (sums, np.stack(expected, 1), "bfloat16_t"),
            (mixed[:, 0], half + half * tenth, "float"),
            (mixed[:, 1], wide(bfloat(x), "bfloat16_t").astype("f4").astype("f2"), "float"),
        ]
        for got, wanted, kind in same:
            np.testing.assert_array_equal(wide(got, kind), wide(wanted, kind))


def test_vectors_and_structs(library: dict[str, sim.Library]) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4)).astype("f4")
    params = np.zeros(
        1, [("shape", "i4", 2), ("_", "V8"), ("scale", "f4", 4), ("shift", "f4", 3), ("flag", "u4")]
    )
    params["shape"], params["scale"], params["shift"], params["flag"] = (
        (9, 8),
        [1, 2, 3, 4],
        [5, 6, 7],
        1,
    )
    out, packed = np.zeros((5, 3, 4), "f4"), np.zeros((5, 3), "f4")
    smaller, halves = np.zeros((5, 4), "?"), np.zeros((5, 2), "u4")
    arrays = [x, params, out, packed, smaller, halves]
    library["vectors"].run(
        "vectors", grid=(5, 1, 1), threadgroup=(1, 1, 1), buffers=dict(enumerate(arrays))
    )
    swapped = x[:, [2, 3, 0, 1]] + np.array([0, 1, 1, 0], "f4")
    assert (out[:, 0] == swapped * np.array([1, 2, 3, 4], "f4") + x[:, 1:2]).all()
    assert (out[:, 1] == x).all()
    assert (out[:, 2] == np.where(x > 1, np.float32(9), x)).all()
    assert (packed == x[:, :3] - np.array([5, 6, 7], "f4")).all()
    assert (smaller == (x < swapped)).all()
    assert (halves == [0x90ABCDEF, 0x12345678]).all()


def butterfly(x: Array) -> Array:
    """The sum of 32 lanes in every lane, added over distances 16, 8, 4, 2, 1."""
    for distance in (16, 8, 4, 2, 1):
        x = x + x[..., np.arange(32) ^ distance]
    return x


def simd_expected(x: Array, k: Array) -> tuple[list[Array], list[Array]]:
    """What the kernel SIMD gives for simdgroups x, k; NaN and -1 where hardware is undefined."""
    lane, ones = np.arange(32), np.ones_like(x)
    shift = lambda v, d, fill: np.where((lane + d) % 32 == lane + d, v[:, (lane + d) % 32], fill)  # noqa: E731
    quads = x.reshape(2, 8, 4)
    quad = (quads[..., 0] + quads[..., 2]) + (quads[..., 1] + quads[..., 3])
    sums = np.add.accumulate(x, 1)
    product = x.copy()
    for d in (16, 8, 4, 2, 1):
        product = product * product[:, lane ^ d]
    floats = [
        *[butterfly(x), product, ones * x.max(1, keepdims=True), ones * x.min(1, keepdims=True)],
        *[sums, np.pad(sums, ((0, 0), (1, 0)))[:, :-1], x[:, lane ^ 5]],
        *[shift(x, 3, np.nan), shift(x, -3, np.nan), ones * x[:, 7:8], x[:, ::-1]],
        *[shift(x, -2, x.dtype.type(-1)), np.repeat(quad, 4, 1), np.repeat(quads[..., 2], 4, 1)],
    ]
    whole = np.ones_like(k)
    reduce = lambda f: whole * f.reduce(k, 1, keepdims=True)  # noqa: E731
    ballot = ((k > 0) * (1 << lane)).sum(1, keepdims=True).astype("u4").view("i4")
    base, i = lane & ~7, (lane & 7) + 2
    filled = np.where(i < 8, k[:, np.minimum(base + i, 31)], 5)
    ints = [
        *[reduce(f) for f in (np.add, np.bitwise_and, np.bitwise_or, np.bitwise_xor)],
        *[reduce(np.maximum), reduce(np.minimum), whole * ballot],
        *[whole * (k > 900).any(1, keepdims=True), whole * (k > -1001).all(1, keepdims=True)],
        *[whole * (lane == 0), whole * k[:, :1], np.roll(k, -4, 1), np.roll(k, 4, 1)],
        *[np.repeat(k.reshape(2, 8, 4).max(2), 4, 1), k[:, lane ^ 1], filled],
        np.multiply.accumulate(1 + np.fmod(k, 2), 1, dtype="i4"),
        whole * (lane % 4),
    ]
    return floats, ints


@pytest.mark.parametrize("seed", [None, 5])
def test_simdgroup_functions(library: dict[str, sim.Library], seed: int | None) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 32)).astype("f4")
    k = rng.integers(-1000, 1000, (2, 32), dtype="i4")
    floats, ints = simd_expected(x, k)
    f, g = np.zeros((len(floats), 64), "f4"), np.zeros((len(ints), 64), "i4")
    library["simd"].run(
        "simd",
        grid=(1, 1, 1),
        threadgroup=(64, 1, 1),
        buffers={0: x, 1: k, 2: f, 3: g},
        seed=seed,
    )
    for row, (got, wanted) in enumerate(zip(f, floats, strict=True)):
        np.testing.assert_array_equal(got, wanted.ravel(), err_msg=f"float {row}")
    for row, (got, wanted) in enumerate(zip(g, ints, strict=True)):
        np.testing.assert_array_equal(got, wanted.ravel(), err_msg=f"int {row}")


def test_partial_simdgroup_sums_its_threads(library: dict[str, sim.Library]) -> None:
    x, k = np.arange(1, 41, dtype="f4"), np.ones(40, "i4")
    f, g = np.zeros((14, 40), "f4"), np.zeros((18, 40), "i4")
    report = library["simd"].run(
        "simd", grid=(1, 1, 1), threadgroup=(40, 1, 1), buffers={0: x, 1: k, 2: f, 3: g}
    )
    assert report.clean, report
    assert set(f[0, :32]) == {x[:32].sum()}
    assert set(f[0, 32:]) == {x[32:].sum()}


@pytest.mark.parametrize("threads", [1, 2])
def test_atomics(library: dict[str, sim.Library], threads: int) -> None:
    total, most = np.zeros(1, "f4"), np.zeros(1, "u4")
    claimed, out = np.full(1, -1, "i4"), np.zeros(4, "u4")
    library["atomics"].run(
        "atomics",
        grid=(4, 1, 1),
        threadgroup=(20, 1, 1),
        buffers={0: total, 1: most, 2: claimed, 3: out},
        threadgroup_memory={0: 16},
        threads=threads,
    )
    assert (total[0], most[0]) == (40, 30)
    assert 0 <= claimed[0] < 80
    assert (out == 2**20 - 1).all()


def test_simdgroup_matrix(library: dict[str, sim.Library]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (8, 8)).astype("f4"), rng.integers(-4, 5, (8, 10)).astype("f2")
    out = np.zeros((8, 8), "f4")
    library["product"].run(
        "product", grid=(1, 1, 1), threadgroup=(32, 1, 1), buffers={0: a, 1: b, 2: out}
    )
    assert (out == a @ b[:, 1:9].astype("f4").T + 2 * np.eye(8)).all()
