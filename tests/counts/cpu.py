"""Counts the instructions that the CPU's kernels execute in this package's code, op by op.

Each op runs on one thread, which traps after every instruction (`tests/cpp/step_counter.cpp`). So
nothing else on the machine matters, and the same build gives the same counts every time. It takes
some 15 us an instruction, so ops are small. What comes from MLX and libraries does not count.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETS = {"avx512": "avx512f", "avx2": "avx2"}  # the processor's flag that each set needs
HIDDEN, INTERMEDIATE, EXPERTS = 512, 16, 2
ROWS, COLUMNS = 16, 512  # of a matrix
HEADS, RANK, ROPE, CONTEXT, SELECTED = 16, 64, 32, 64, 32
INDEX_HEADS, INDEX_DIM = 4, 128
PANELED = ("affine4", "bf16")  # formats that rows of a prompt are counted in, too


def unavailable() -> str:
    """Why nothing can be counted here, or ""."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "instructions are counted on x86-64 Linux only"
    return "" if _compiler() else "there is no C++ compiler, which the counter needs"


def sets() -> list[str]:
    """The instruction sets that this processor has kernels for."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = flags[1].split() if flags else []
    return [name for name, flag in SETS.items() if flag in found]


def compiler() -> str:
    """The compiler of the installed extension with its major version, such as "GCC 12"."""
    from glm_fused import _ext

    text = Path(_ext.__file__).read_bytes()
    if found := re.search(rb"(GCC): \([^)]*\) (\d+)|(clang) version (\d+)", text):
        name, version = (part.decode() for part in found.groups() if part)
        return f"{name} {version}"
    return "unknown"


def build_counter(folder: Path) -> Path:
    """Compile the counter in ``folder``; errors are those of `build`."""
    return build(ROOT / "tests/cpp/step_counter.cpp", folder / "step_counter.so")


def build(source: Path, target: Path) -> Path:
    """Compile a shared library. Raises RuntimeError, with what the compiler says, if that fails."""
    command = [_compiler(), "-std=c++20", "-O2", "-shared", "-fPIC", "-o", target, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return target


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def count(counter: Path, kernels: str, only: str = "") -> dict[str, int]:
    """The instructions of each op, or the ``only`` one, with the kernels of an instruction set.

    They run in a new process. Raises RuntimeError, with what it says, where that fails.
    """
    env = os.environ | {"GLM_FUSED_KERNELS": kernels, "GLM_FUSED_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.counts.cpu", str(counter), only]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"counting with {kernels} ended with {done.returncode}: {done.stderr}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def ops_to_count() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each hot op on the smallest shapes that take its kernels' usual course.

    Each has random bits of its own: selections take more or fewer instructions by what they see.
    """
    import mlx.core as mx

    from glm_fused import ops
    from glm_fused.formats import kv_rows
    from glm_fused.formats.weights import FORMATS
    from glm_fused.selftest.synthetic import Bits

    def floats(*shape: int) -> mx.array:
        return Bits(sum(shape)).floats(shape, mx.bfloat16)

    def weight(fmt: str, *shape: int) -> ops.Weight:
        return Bits(0).weight(shape, FORMATS[fmt], mx.bfloat16)

    for name in FORMATS:
        if "-g" in name:  # another size of group
            continue
        w = weight(name, ROWS, COLUMNS)
        for rows in (1, 8) if name in PANELED else (1,):
            x = floats(rows, COLUMNS)
            yield f"quantized_matvec, {name}, {rows} x", lambda x=x, w=w: ops.quantized_matvec(x, w)
    gate, down = (EXPERTS, INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    mlp = [weight("bf16", *shape) for shape in (gate, gate, down)]
    x, slots, scores = floats(1, HIDDEN), mx.array([[1]], mx.int32), mx.ones((1, 1))
    yield "moe_decode, bf16", lambda: ops.moe_decode(x, *mlp, slots, scores)
    router, bias = floats(32, HIDDEN).astype(mx.float32), mx.zeros((32,))
    yield "router_topk", lambda: ops.router_topk(x, router, bias, top_k=4)
    for kv_format in ("bf16", *kv_rows.PACKED):
        rows = floats(1, CONTEXT, RANK), floats(1, CONTEXT, ROPE)
        keys = floats(1, CONTEXT, INDEX_DIM)
        if kv_format in kv_rows.PACKED:
            wide = [a.astype(mx.float32) for a in (*rows, keys)]
            rows = kv_rows.pack(wide[0], wide[1], kv_format), None
            keys = kv_rows.pack(wide[2], None, kv_format)
        q = floats(1, 1, HEADS, RANK + ROPE)
        selected = mx.arange(SELECTED, dtype=mx.int32)[None, None] * 2
        yield (
            f"sparse_mla_decode, {kv_format} rows",
            lambda q=q, rows=rows, selected=selected: ops.sparse_mla_decode(
                q, *rows, selected, rank=RANK, scale=0.1
            ),
        )
        q, weights = floats(1, 1, INDEX_HEADS, INDEX_DIM), mx.ones((1, 1, INDEX_HEADS))
        yield (
            f"indexer_topk, {kv_format} rows",
            lambda q=q, keys=keys, weights=weights: ops.indexer_topk(
                q, keys, weights, SELECTED, scale=0.1
            ),
        )
    row, scale = floats(1, COLUMNS), floats(COLUMNS)
    yield "rms_norm", lambda: ops.rms_norm(row, scale, 1e-5)
    yield "layer_norm", lambda: ops.layer_norm(row, scale, scale, 1e-5)
    heads, angles = floats(1, INDEX_HEADS, 1, ROPE), mx.ones((2, 1, 1, 1, ROPE // 2))
    yield "rotate", lambda: ops.rotate(heads, angles[0], angles[1])


def code_of(path: str) -> tuple[int, int]:
    """The addresses [first, last + 1) of the code that was loaded from a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, flags, *_, name = line.split()
        if name == path and "x" in flags:
            low, high = addresses.split("-")
            return int(low, 16), int(high, 16)
    raise RuntimeError(f"{path} is not loaded")


def main(counter: str, only: str) -> None:
    """Print the counts of this process's kernels, of all ops or the ``only`` one, as JSON."""
    import mlx.core as mx

    from glm_fused import _ext

    library = ctypes.CDLL(counter)
    library.begin_counting.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.end_counting.restype = ctypes.c_uint64
    code, found = code_of(_ext.__file__), {}
    for name, make in ops_to_count():
        if only not in ("", name):
            continue
        mx.eval(make())  # the first has more to do
        y = make()
        library.begin_counting(*code)
        mx.eval(y)
        mx.synchronize()
        found[name] = library.end_counting()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
