"""Each lint rule refuses its bad sample at the right line and accepts its good one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sim
from shader_texts import shader
from sim import lint
from sim.__main__ import main

# Each has a message, a bad sample (the problem is on line 2) and a good one.
SAMPLES = {
    "parameter": (
        "pointer without",
        "inline float f(\n    const float* x, int n) {\n  return x[n];\n}",
        "inline float f(const device float* x, int n) {\n  return x[n] * n;\n}",
    ),
    "reference": (
        "reference without",
        "template <typename T>\nvoid f(T& x) {\n}",
        "template <typename T, int N = (3 > 2)>\nvoid f(thread T& x, constant T& y) {\n}",
    ),
    "variable": (
        "pointer without",
        "void f(device float* x) {\n  float* y = x;\n}",
        "void f(device float* x) {\n  device float* y = x + 2 * 3;\n  int n = y[0] * x[1];\n}",
    ),
    "loop variable": (
        "pointer without",
        "void f(device float* x) {\n  for (float* p = x; p[0] > 0; p++) {\n  }\n}",
        "void f(device float* x) {\n  for (device float* p = x; p[0] > 0; p++) {\n  }\n}",
    ),
    "member": (
        "pointer without",
        "struct S {\n  half* x;\n};",
        "struct S {\n  device half* x;\n  S operator*(S o) const thread { return o; }\n};",
    ),
    "cast": (
        "pointer without",
        "void f(device uint* x) {\n  uchar y = ((uchar*)x)[1];\n}",
        "void f(device uint* x) {\n  uchar y = ((device uchar*)x)[1] * (x[0] & 3);\n}",
    ),
    "static_cast": (
        "pointer without",
        "void f(device void* x) {\n  g(static_cast<uchar*>(x));\n}",
        "void f(device void* x) {\n  g(static_cast<device uchar*>(x));\n}",
    ),
    "threadgroup variable": (
        "threadgroup variable",
        "void f() {\n  threadgroup float x[32];\n}",
        "[[kernel]] void f() {\n  threadgroup float x[32];\n  threadgroup float* y = x;\n}",
    ),
    "recursion": (
        "recursion: f calls itself",
        "int f(int n) {\n  return n < 2 ? 1 : n * f(n - 1);\n}",
        "int f(int n) { return n; }\nint g(int n, int m) {\n  return f(n) + a.g(n, m) + g(n);\n}",
    ),
    "mutual recursion": (
        "recursion",
        "int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return f(n); }",
        "int g(int n) { return n; }\nint f(int n) { return g(n); }",
    ),
    "goto": ("goto", "void f() {\n  goto end;\n}", "void f() {\n  return;\n}"),
    "double": (
        "double",
        "void f() {\n  double x = 1;\n}",
        "void f() {\n  float x = 1; // double\n}",
    ),
    "long double": (
        "double",
        "void f() {\n  long double x = 1;\n}",
        "void f() {\n  long x = 1;\n}",
    ),
    "throw": ("exceptions", "void f() {\n  throw 1;\n}", "void f() {\n  int rethrown = 1;\n}"),
    "new": ("new", "void f() {\n  auto x = new int;\n}", "void f() {\n  auto x = 3;\n}"),
    "delete": ("delete", "void f() {\n  delete x;\n}", "struct S {\n  S() = delete;\n};"),
    "virtual": ("virtual", "struct S {\n  virtual int f();\n};", "struct S {\n  int f();\n};"),
    "typeid": (
        "type information",
        "void f() {\n  typeid(3);\n}",
        "void f() {\n  is_same<T, U>();\n}",
    ),
    "OpenCL": (
        "OpenCL",
        "void f(\n    __global float* x) {\n}",
        "void f(\n    device float* x) {\n}",
    ),
    "compiler's half": (
        "half is",
        "void f() {\n  _Float16 x = 1;\n}",
        "void f() {\n  half x = 1;\n}",
    ),
    "compiler's bfloat": ("bfloat is", "void f() {\n  __bf16 x;\n}", "void f() {\n  bfloat x;\n}"),
    "assembly": ("inline assembly", 'void f() {\n  __asm__("nop");\n}', "void f() {\n  g();\n}"),
    "thread_local": ("thread_local", "\nthread_local constant int x = 1;", "constant int x = 1;"),
    "dynamic_cast": (
        "type information",
        "void f(thread A* x) {\n  auto y = dynamic_cast<thread B*>(x);\n}",
        "void f(thread A* x) {\n  auto y = static_cast<thread B*>(x);\n}",
    ),
    "try": ("exceptions", "void f() {\n  try { g(); } catch (...) {}\n}", "void f() {\n  g();\n}"),
    "std": ("std::", "void f() {\n  std::max(1, 2);\n}", "void f() {\n  metal::max(1, 2);\n}"),
    "lambda": (
        "lambda",
        "void f() {\n  auto g = [&](int x) { return x; };\n}",
        "void f(uint i [[thread_position_in_grid]]) {\n  int x[2] = {a[0], b[1]};\n}",
    ),
    "global": (
        "global variable",
        "struct S { int x; };\nint counter = 0;\n",
        "constant int limit = 3;\nconstant constexpr float scales[] = {1, 2};\nusing T = int;\n",
    ),
    "static": (
        "static variable",
        "void f() {\n  static int calls = 0;\n}",
        "struct S {\n  static constexpr constant int n = 1;\n  static int f() { return n; }\n};",
    ),
    "threadgroup memory": (
        "36864 bytes of threadgroup memory",
        "constant constexpr int N = 96;\nkernel void f() {\n  threadgroup float x[N][N];\n}",
        "constant constexpr int N = 64;\nkernel void f() {\n  threadgroup half x[N][N], y[N];\n}",
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_rule(name: str) -> None:
    message, bad, good = SAMPLES[name]
    problems = lint.check_text(bad)
    assert [p for p in problems if p.startswith("source.metal:2: ") and message in p], problems
    assert lint.check_text(good) == []


METAL = Path(__file__).parent.parent / "metal"
SHADERS = sorted(p.relative_to(METAL) for p in [*METAL.rglob("*.h"), *METAL.rglob("*.metal")])


def test_every_word_has_a_sample() -> None:
    bad = " ".join(sample for _, sample, _ in SAMPLES.values())
    words = {w for w in lint._REFUSED if not w.startswith(("__", "asm"))}
    assert {w for w in words if w not in bad} == set()


@pytest.mark.parametrize("file", SHADERS, ids=str)
def test_our_shaders_pass(file: Path) -> None:
    assert lint.check(METAL / file) == []


@pytest.mark.parametrize("name", [f.stem for f in SHADERS if f.suffix == ".metal"])
def test_the_embedded_text_passes(name: str) -> None:
    assert lint.check_text(shader(name), f"{name}.metal") == []


KERNEL = re.compile(r"^\[\[kernel(.*?)\]\]\s+void\s+(\w+)\((.*?)\) \{", re.M | re.S)


def unsaid(text: str) -> list[str]:
    """The kernels that neither say how many threads they take nor ask how many there are."""
    found = KERNEL.findall(text)
    assert len(found) == text.count("[[kernel")
    return [
        kernel
        for attributes, kernel, parameters in found
        if "max_total_threads_per_threadgroup(" not in attributes
        and "[[simdgroups_per_threadgroup]]" not in parameters
    ]


@pytest.mark.parametrize("name", [f.stem for f in SHADERS if f.suffix == ".metal"])
def test_kernels_say_how_many_threads_they_take(name: str) -> None:
    """The launchers of those that ask do so of the pipeline."""
    assert unsaid(shader(name)) == []


def test_kernels_that_say_nothing_are_found() -> None:
    text = shader("sparse_mla_decode")
    limit = "[[kernel, max_total_threads_per_threadgroup(kMlaThreads)]]"
    assert limit in text
    assert unsaid(text.replace(limit, "[[kernel]]")) == ["mla_split"]


@pytest.mark.parametrize(
    "file",
    ["quantized.h", "fp_quantized.h", "gemv.h", "sdpa_vector.h", "sort.h", "softmax.h", "fp4.h"],
)
def test_mlx_kernels_pass(file: str) -> None:
    assert lint.check(sim.mlx_include() / "mlx/backend/metal/kernels" / file) == []


def test_directives_and_comments_are_skipped() -> None:
    text = "#define F(T) \\\n  T* x; double y\n/* goto */ // new\nconstant int a = 1;\ndouble b;\n"
    assert [p.split(":")[1] for p in lint.check_text(text)] == ["5", "5"]


@pytest.mark.parametrize("source", ["1.0f", "half(1)", "x[0] * 2.0f"])
def test_no_implicit_conversion_to_bfloat(source: str) -> None:
    """It needs no rule, as the simulator refuses it as Apple's compiler does."""
    text = "#include <metal_stdlib>\nkernel void f(device bfloat* x) {{\n  x[0] = {};\n}}"
    sim.compile(text.format(f"bfloat({source})"))
    with pytest.raises(sim.CompileError, match=r"source.metal:3:8: error"):
        sim.compile(text.format(source))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.metal", tmp_path / "bad.metal"
    good.write_text("constant int a = 1;\n")
    bad.write_text("constant int a = 1;\ndouble b;\n")
    assert main(["lint", str(good)]) == 0
    assert main(["lint", str(good), str(bad)]) == 1
    assert f"{bad}:2: double: not in Metal" in capsys.readouterr().out
