"""Every planted mistake is found at its line, and its corrected twin has no findings."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sim
from sim_support import Array, bits, empty, error, number, wide

# FIX chooses the correct twin. Each kernel has two buffers of floats and one thread per element.
KERNELS = """
#include <metal_stdlib>
using namespace metal;
constant bool FIX [[function_constant(0)]];

#define KERNEL(name)                                   \\
  kernel void name(                                    \\
      device float* in [[buffer(0)]],                  \\
      device float* out [[buffer(1)]],                 \\
      uint id [[thread_index_in_threadgroup]],         \\
      uint n [[threads_per_threadgroup]],              \\
      uint lane [[thread_index_in_simdgroup]],         \\
      uint group [[threadgroup_position_in_grid]])

KERNEL(missing_barrier) {
  threadgroup float shared[64];
  shared[id] = in[id];
  if (FIX) threadgroup_barrier(mem_flags::mem_threadgroup);
  out[id] = shared[(id + 33) % n];  // here: missing_barrier
}
KERNEL(reused_too_early) {
  threadgroup float shared[64];
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    shared[id] = in[id] + i;  // here: reused_too_early
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += shared[(id + 33) % n];
    if (FIX) threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[id] = sum;
}
KERNEL(simdgroup_only) {
  threadgroup float shared[64];
  shared[id] = in[id];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[id] = shared[FIX ? id ^ 1 : id ^ 32];  // here: simdgroup_only
}
KERNEL(wrong_memory) {
  in[id] = in[id] + 1;
  threadgroup_barrier(FIX ? mem_flags::mem_device : mem_flags::mem_threadgroup);
  out[id] = in[n - 1 - id];  // here: wrong_memory
}
KERNEL(same_output) {
  out[FIX ? group * n + id : id] = in[id];  // here: same_output
}
KERNEL(past_the_end) {
  out[id] = in[FIX ? id : id + 1];  // here: past_the_end
}
KERNEL(before_the_start) {
  (out + id)[FIX ? 0 : -1] = in[id];  // here: before_the_start
}
KERNEL(past_shared) {
  threadgroup float shared[64];
  shared[FIX ? id : id + 1] = in[id];  // here: past_shared
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[id] = id ? shared[id] : 0;
}
KERNEL(unwritten) {
  threadgroup float shared[64];
  if (FIX || id != 5) shared[id] = in[id];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[id] = shared[n - 1 - id];  // here: unwritten
}
KERNEL(some_skip_the_barrier) {
  if (FIX || id < 40) threadgroup_barrier(mem_flags::mem_none);  // here: some_skip_the_barrier
  out[id] = in[id];
}
KERNEL(two_barriers) {
  if (FIX || id < 32)
    threadgroup_barrier(mem_flags::mem_none);  // here: two_barriers
  else
    threadgroup_barrier(mem_flags::mem_none);
  out[id] = in[id];
}
KERNEL(early_return) {
  if (!FIX && id >= 60) return;
  threadgroup_barrier(mem_flags::mem_none);  // here: early_return
  out[id] = in[id];
}
KERNEL(two_sums) {
  float x = in[id];
  if (FIX || lane < 16) x = simd_sum(x);  // here: two_sums
  else x = simd_max(x);
  out[id] = x;
}
KERNEL(counted) {
  threadgroup atomic_int count;
  if (id == 0) atomic_store_explicit(&count, 0, memory_order_relaxed);
  if (FIX) threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&count, 2, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!FIX && id == 0) atomic_store_explicit(&count, 0, memory_order_relaxed);
  if (!FIX && id == 1) ((threadgroup int*)&count)[0] = 1;  // here: counted
  out[id] = atomic_load_explicit(&count, memory_order_relaxed);
}
KERNEL(set_and_counted) {
  device atomic_int* count = (device atomic_int*)out;
  if (!FIX && id == 0) ((device int*)out)[0] = 1;
  atomic_fetch_add_explicit(count, 1, memory_order_relaxed);  // here: set_and_counted
}
KERNEL(between_elements) {
  device uchar* bytes = (device uchar*)in;
  out[id] = *(device float*)(bytes + 4 * id + (FIX || id > 9 ? 0 : 2));  // here: between_elements
}
KERNEL(past_own_array) {
  thread float own[8] = {};
  own[int(in[FIX ? 7 : 8])] = 1;  // here: past_own_array
  out[id] = own[id % 8];
}
KERNEL(far_away) {
  out[id] = in[FIX ? id : 1ul << 40];  // here: far_away
}
"""
FINDINGS = {
    "missing_barrier": "races",
    "reused_too_early": "races",
    "simdgroup_only": "races",
    "wrong_memory": "races",
    "same_output": "races",
    "past_the_end": "out_of_bounds",
    "before_the_start": "out_of_bounds",
    "past_shared": "out_of_bounds",
    "unwritten": "uninitialised",
    "some_skip_the_barrier": "divergence",
    "two_barriers": "divergence",
    "early_return": "divergence",
    "two_sums": "divergence",
    "counted": "races",
    "set_and_counted": "races",
    "between_elements": "misaligned",
}
# These end the launch.
STOPS = {
    "past_own_array": "undefined behaviour, such as an index outside an array",
    "far_away": "stray access",
}
LINES = {
    line.split("here: ")[1]: number
    for number, line in enumerate(KERNELS.split("\n"), 1)
    if "here: " in line
}


@pytest.fixture(scope="module")
def traced() -> sim.Library:
    return sim.compile(KERNELS, trace=True)


@pytest.fixture(scope="module")
def untraced() -> sim.Library:
    return sim.compile(KERNELS)


def run(library: sim.Library, name: str, fixed: bool, **how: Any) -> sim.Report:
    groups = 2 if name == "same_output" else 1
    arrays = {0: np.arange(64, dtype="f4"), 1: np.zeros(64 * groups, "f4")}
    return library.run(
        name,
        grid=(groups, 1, 1),
        threadgroup=(64, 1, 1),
        buffers=arrays,
        constants={"FIX": fixed},
        **how,
    )


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", FINDINGS)
def test_mistake_is_found(traced: sim.Library, name: str, seed: int | None) -> None:
    report = run(traced, name, False, seed=seed)
    lines = {n for f in getattr(report, FINDINGS[name]) for n in (f.line, f.other_line)}
    assert LINES[name] in lines, report
    assert not report.clean
    assert f"{name} at source.metal:{LINES[name]}: " in str(report) or seed is not None


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", [*FINDINGS, *STOPS])
def test_correct_twin_is_clean(traced: sim.Library, name: str, seed: int | None) -> None:
    report = run(traced, name, True, seed=seed)
    assert report.clean, report


@pytest.mark.parametrize("name", STOPS)
def test_mistake_ends_the_launch(traced: sim.Library, name: str) -> None:
    with pytest.raises(sim.LaunchError, match=f"source.metal:{LINES[name]}: {STOPS[name]}"):
        run(traced, name, False)


def test_divergence_is_found_untraced(untraced: sim.Library) -> None:
    for name in (n for n, kind in FINDINGS.items() if kind == "divergence"):
        assert run(untraced, name, False).divergence
        assert run(untraced, name, True).clean


def test_stray_access_untraced(untraced: sim.Library) -> None:
    told = r"byte 256 of buffer 0 \(256 bytes\), by threadgroup 0 thread 63"
    with pytest.raises(sim.LaunchError, match=f"source.metal:{LINES['past_the_end']}: .*{told}"):
        run(untraced, "past_the_end", False)
    assert run(untraced, "past_the_end", True).clean  # the process and the library live on


def test_race_names_both_threads(traced: sim.Library) -> None:
    race = run(traced, "same_output", False).races[0]
    assert (race.buffer, race.thread[0], race.other_thread[0]) == (1, 1, 0)
    assert race.thread[1] == race.other_thread[1]


def test_traffic_is_exact() -> None:
    library = sim.compile(
        """
        #include <metal_stdlib>
        kernel void gather(
            device const float4* table [[buffer(0)]],
            constant const uint* rows [[buffer(1)]],
            device half4* out [[buffer(2)]],
            constant const uint& rounds [[buffer(3)]],
            uint i [[thread_position_in_grid]]) {
          if (rounds > 0) out[i] = half4(table[rows[i]]);
        }""",
        trace=True,
    )
    table = np.random.default_rng(0).standard_normal((8, 4)).astype("f4")
    rows = np.array([0, 0, 3, 3, 3, 7, 0, 1], "u4")
    out = np.zeros((8, 4), "f2")
    arrays = {0: table, 1: rows, 2: out, 3: number(1, "uint32")}
    report = library.run("gather", grid=(2, 1, 1), threadgroup=(4, 1, 1), buffers=arrays)
    assert (out == table[rows].astype("f2")).all()
    assert report.traffic == {
        0: sim.Traffic(8 * 16, 0, 4 * 16, 0),
        1: sim.Traffic(8 * 4, 0, 8 * 4, 0),
        2: sim.Traffic(0, 8 * 8, 0, 8 * 8),
        3: sim.Traffic(8 * 4, 0, 4, 0),
    }
    assert (report.threadgroups, report.threads, report.barriers) == (2, 8, 0)


def test_threadgroup_memory_is_counted() -> None:
    """Each of 8 threads writes a float4 and reads one; half of the threads read a float more."""
    library = sim.compile(
        "#include <metal_stdlib>\nusing namespace metal;\n"
        "kernel void f(device float* y, uint id [[thread_index_in_threadgroup]]) {\n"
        "  threadgroup float4 shared[8];\n"
        "  shared[id] = float4(id);\n"
        "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "  const float4 other = shared[7 - id];\n"
        "  y[id] = other[0] + other[1] + other[2] + other[3];\n"
        "  if (id % 2 == 0) y[id] += shared[id][1];\n"
        "}",
        trace=True,
    )
    y = np.zeros(8, "f4")
    report = library.run("f", grid=(1, 1, 1), threadgroup=(8, 1, 1), buffers={0: y})
    assert y.tolist() == [28, 24, 22, 16, 16, 8, 10, 0]
    assert (report.threadgroup_written, report.threadgroup_read) == (8 * 16, 8 * 16 + 4 * 4)


SDPA = """
#include "mlx/backend/metal/kernels/utils.h"
{}
instantiate_kernel("sdpa", sdpa_vector, bfloat16_t, 64, 64)
"""


def attention(library: sim.Library) -> tuple[sim.Report, float]:
    heads, kv_heads, queries, keys, width = 2, 1, 2, 75, 64
    shapes = [(heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, width)]
    q, k, v = (
        mx.random.normal(s, key=mx.random.key(i)).astype(mx.bfloat16) for i, s in enumerate(shapes)
    )
    out = empty((heads, queries, width), "bfloat16_t")
    strides = [number(n, "uint64") for n in (keys * width, width, keys * width, width)]
    arrays: list[Array] = [bits(q), bits(k), bits(v), out, number(heads // kv_heads), number(keys)]
    arrays += [*strides, np.array([width**-0.5], "f4")]
    report = library.run(
        "sdpa",
        grid=(heads, queries, 1),
        threadgroup=(1024, 1, 1),
        buffers=dict(enumerate(arrays)),
        constants={"do_causal": True},
    )
    scores = np.einsum("hqd,kd->hqk", wide(q), wide(k)[0]) * width**-0.5
    scores[:, 0, -1] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ wide(v)[0]
    return report, error(wide(out, "bfloat16_t"), expected)


def test_mlx_attention_is_clean_and_needs_its_barriers() -> None:
    """Untouched it is right and clean; without any one of its barriers there are races."""
    text = (sim.mlx_include() / "mlx/backend/metal/kernels/sdpa_vector.h").read_text()
    text = text[: text.index("void sdpa_vector_2pass_1")].rpartition("template <")[0]
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    pieces = text.split(barrier)
    assert len(pieces) > 2
    for missing in (None, 1, len(pieces) - 1):
        kept = "".join(
            ("" if i in (0, missing) else barrier) + piece for i, piece in enumerate(pieces)
        )
        library = sim.compile(SDPA.format(kept), include_dirs=[sim.mlx_include()], trace=True)
        report, wrong = attention(library)
        if missing is None:
            assert report.clean, report
            assert wrong < 6e-3
        else:
            assert report.races, f"barrier {missing}: {report}"
