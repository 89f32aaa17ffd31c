"""The compiler driver: cache, errors, instantiation, function constants, command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sim
from sim import cache, compiler
from sim.__main__ import main
from sim.rewrite import rewrite

SCALE = """
#include <metal_stdlib>
using namespace metal;
constant float factor [[function_constant(3)]];
constant bool add [[function_constant(4)]];
struct Params { uint n; };
template <typename T>
[[kernel]] void scale(
    const device T* x [[buffer(0)]],
    device T* y [[buffer(2)]],
    constant const Params& params [[buffer(5)]],
    uint i [[thread_position_in_grid]]) {
  if (i < params.n) {
    y[i] = add ? T(x[i] + factor) : T(x[i] * factor);
  }
}
template [[host_name("scale_float")]] [[kernel]] decltype(scale<float>) scale<float>;
template [[host_name("scale_half")]] [[kernel]] void scale<half>(
    const device half*, device half*, constant const Params&, uint);
"""


def run(library: sim.Library, x: np.ndarray, **constants: float) -> np.ndarray:
    y = np.zeros_like(x)
    library.run(
        "scale_half" if x.dtype == np.float16 else "scale_float",
        grid=(len(x), 1, 1),
        threadgroup=(8, 1, 1),
        grid_in_threads=True,
        buffers={0: x, 2: y, 5: np.array([len(x)], "u4")},
        constants=dict(constants),
    )
    return y


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty but for the executor."""
    executor = compiler.executor()
    monkeypatch.setenv("GLM_FUSED_SIM_CACHE", str(tmp_path))
    shutil.copyfile(executor, tmp_path / executor.name)
    return tmp_path


def test_kernels_and_signatures() -> None:
    library = sim.compile(SCALE)
    assert list(library.kernels) == ["scale_float", "scale_half"]
    shown = [
        (a.kind, a.index, a.name, a.space, a.writable)
        for a in library.kernels["scale_half"].arguments
    ]
    assert shown == [
        ("buffer", 0, "x", "device", False),
        ("buffer", 2, "y", "device", True),
        ("buffer", 5, "params", "constant", False),
        ("position", -1, "i", "", False),
    ]
    assert [(c.name, c.type, c.index) for c in library.constants] == [
        ("factor", "float", 3),
        ("add", "bool", 4),
    ]


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_function_constants_are_of_one_launch(dtype: str) -> None:
    library, x = sim.compile(SCALE), np.arange(13, dtype=dtype)
    for factor in (2.0, 3.0, 2.0):
        assert (run(library, x, factor=factor) == x * factor).all()
        assert (run(library, x, factor=factor, add=True) == x + factor).all()
    assert not run(library, x).any()


def test_cache_hit_and_miss(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda *a: built.append("once") or build(*a))
    header = own_cache / "value.h"
    text = '#include "value.h"\nkernel void f(device int* x) { x[0] = VALUE; }'
    paths = []
    for value, contract, comment in [
        (1, False, ""),
        (1, False, "//"),
        (2, False, ""),
        (2, True, ""),
    ]:
        header.write_text(f"#define VALUE {value}\n")
        library = sim.compile(text + comment, include_dirs=[own_cache], contract=bool(contract))
        paths.append(library.path)
    assert len(built) == 3
    assert paths[0] == paths[1] and len(set(paths)) == 3
    assert not list(own_cache.glob("build-*"))


def test_failed_build_leaves_nothing(own_cache: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.cached("x.so", lambda scratch: scratch / str(1 // 0))
    assert not list(own_cache.glob("build-*")) and not (own_cache / "x.so").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kernel void f(device float* x) {\n  x[0] = y;\n}", r"source.metal:2:10: error: .*'y'"),
        (
            "kernel void f(device float* x) {\n  threadgroup float* t = x;\n}",
            r"metal:2:18: error: .*threadgroup",
        ),
        ("kernel void f(device float* x) {\n  if (1) {\n}", "source.metal:1: '{' is never closed"),
        ("kernel void f(device float* x) {\n  }}", "source.metal:2: unmatched"),
        ('#include "absent.h"\n', r"source.metal:1:10: fatal error: 'absent.h' file not found"),
        ('template [[host_name("g")]] [[kernel]] decltype(f<1>) f<1>;', "'f', which is no kernel"),
        ("kernel void f(float x [[color(0)]]) {}", "float x: unknown attribute"),
        ("kernel void f(device int* x [[buffer(31)]]) {}", "x: buffer 31, Metal has 0 to 30"),
        (
            "kernel void f(device int* x [[buffer(2)]], device int* y [[buffer(2)]]) {}",
            "x and y are both buffer 2",
        ),
    ],
)
def test_errors_name_the_line(text: str, told: str) -> None:
    with pytest.raises(sim.CompileError, match=told):
        sim.compile(text)


def test_rewriting_keeps_lines() -> None:
    text = "\n".join(
        [
            '# 1 "a.metal"',
            "__constant int n [[function_constant(0)]];",
            "kernel void f(",
            "    __global int* x) {",
            "  __local float",
            "      t[4];",
            "  x[0] = n ? x[1] : x[2];",
            "}",
        ]
    )
    lines = rewrite(text, "").text.split("\n")
    assert lines[6].startswith("  x[0] = n ?")
    assert lines[7] == "}"


LIMITED = """
#include <metal_stdlib>
constant constexpr int N = 8;
[[kernel, max_total_threads_per_threadgroup(N)]] void plain(device int* x) { x[0] = 1; }
template <typename T, int n, int m = 2 * n>
[[kernel, max_total_threads_per_threadgroup(n * m)]] void made(device T* x) { x[0] = 1; }
template [[host_name("made_4")]] [[kernel]] decltype(made<int, 4>) made<int, 4>;
template [[host_name("made_20")]] [[kernel]] decltype(made<int, 4, 5>) made<int, 4, 5>;
kernel void free(device int* x) { x[0] = 1; }
"""


@pytest.mark.parametrize(
    ("name", "most"), [("plain", 8), ("made_4", 32), ("made_20", 20), ("free", 1024)]
)
def test_threads_are_as_many_as_the_attribute_says(name: str, most: int) -> None:
    library, x = sim.compile(LIMITED), np.zeros(1, "i4")
    library.run(name, grid=(1, 1, 1), threadgroup=(most, 1, 1), buffers={0: x})
    assert x[0] == 1
    with pytest.raises(sim.LaunchError, match=f"1 to {most} threads, not {most + most}"):
        library.run(name, grid=(1, 1, 1), threadgroup=(most, 2, 1), buffers={0: x})


def test_bad_launches() -> None:
    library, x = sim.compile(SCALE), np.zeros(8, "f4")
    how = {"grid": (1, 1, 1), "threadgroup": (8, 1, 1)}
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(KeyError, match=r"no kernel 'scale'; there are: scale_float, scale_half"):
        library.run("scale", buffers={}, **how)
    with pytest.raises(ValueError, match=r"no buffer 1; it has \[0, 2, 5\]"):
        library.run("scale_float", buffers={1: x}, **how)
    with pytest.raises(ValueError, match=r"buffer 2 \(y\) is written by the kernel"):
        library.run("scale_float", buffers={2: frozen}, **how)
    with pytest.raises(KeyError, match=r"no function constant 'scale'; there are: 3 factor, 4 add"):
        library.run("scale_float", buffers={}, constants={"scale": 1}, **how)
    with pytest.raises(sim.LaunchError, match="1 to 1024 threads, not 2048"):
        library.run("scale_float", buffers={}, grid=(1, 1, 1), threadgroup=(2048, 1, 1))
    with pytest.raises(sim.LaunchError, match=r"source.metal:14: .*buffer 0 is not bound"):
        library.run("scale_float", buffers={2: x, 5: np.array([8], "u4")}, **how)
    for sizes, told in [({0: 20}, "multiple of 16"), ({0: 20000, 1: 20000}, "40000 in all, 32768")]:
        with pytest.raises(sim.LaunchError, match=told):
            library.run("scale_float", buffers={}, threadgroup_memory=sizes, **how)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("x[0] = x[0] / x[1];", "source.metal:3: integer division by zero"),
        ("threadgroup float t[9000]; t[x[0]] = 1; x[0] = t[1];", "36000 bytes are needed, 32768"),
    ],
)
def test_failing_kernels(body: str, told: str) -> None:
    text = f"#include <metal_stdlib>\nkernel void f(device int* x) {{\n  {body}\n}}"
    with pytest.raises(sim.LaunchError, match=told):
        sim.compile(text).run(
            "f", grid=(1, 1, 1), threadgroup=(1, 1, 1), buffers={0: np.zeros(2, "i4")}
        )


def test_overlapping_buffers_are_one_memory() -> None:
    text = "kernel void f(const device int* x, device int* y, constant int& n) { y[n] = x[0] + 1; }"
    memory = np.arange(64, dtype="i4")
    arrays = {0: memory[3:9], 1: memory, 2: np.array([5], "i4")}
    sim.compile(f"#include <metal_stdlib>\n{text}").run(
        "f", grid=(1, 1, 1), threadgroup=(1, 1, 1), buffers=arrays
    )
    assert memory[5] == 4


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "scale.metal", tmp_path / "scale.so"
    source.write_text(SCALE)
    assert main(["compile", str(source), "-o", str(out), "--contract", "-D", "UNUSED=1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [k["name"] for k in shown["kernels"]] == ["scale_float", "scale_half"]
    assert shown["constants"][0] == {"name": "factor", "type": "float", "index": 3}
    assert out.exists() and Path(shown["executor"]).exists()
    assert main(["runtime"]) == 0
    assert capsys.readouterr().out.strip() == shown["executor"]
    source.write_text("oops")
    assert main(["compile", str(source)]) == 1
    assert "scale.metal:1:1: error" in capsys.readouterr().err


def test_readme_example(tmp_path: Path) -> None:
    readme = (Path(sim.__file__).parent / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    root = str(Path(sim.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", example],
        env={**os.environ, "PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "no findings" in done.stdout, done.stderr
