"""The compilers: clang for shaders (from PyPI's ziglang), a C++ one for the executor."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = HERE / "msl"
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())

_DIALECT = [
    *("-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc"),
    *("-Xclang", "-cl-single-precision-constant", "-Xclang", "-cl-ext=+cl_khr_fp16"),
    *("-target", f"{MACHINE}-linux-gnu", "-fsigned-char"),
    *("-march=x86-64-v3",) * (MACHINE == "x86_64"),
]
_SPACES = {"global": "device", "local": "threadgroup", "constant": "constant", "private": "thread"}
_QUIET = [
    f"-Wno-{name}"
    for name in (
        "duplicate-decl-specifier",
        "gnu-line-marker",
        "unknown-attributes",
        "unknown-pragmas",
        "unused-value",
    )
]
# Half is rounded after every operation, as on the GPU; math is safe, as MLX compiles its shaders.
_ARITHMETIC = ["-Xclang", "-ffloat16-excess-precision=none", "-fno-fast-math"]
_CODE = ["-O2", "-fno-unroll-loops", "-fPIC", "-g1", "-gdwarf-4", "-fno-stack-protector"]
_CODE += ["-mllvm", "-trap-unreachable"]
_TRACE = [
    "-fsanitize=thread",
    *("-fno-slp-vectorize", "-fno-vectorize", "-fno-optimize-sibling-calls"),
    # This checks the indices of a thread's own arrays, which the tracer does not see.
    *("-fsanitize=local-bounds", "-fsanitize-trap=local-bounds", "-fno-sanitize-merge"),
    *("-fno-builtin-memset", "-fno-builtin-memcpy"),
    # A thread's own memory starts as NaN, so that a read before any write is no lucky zero.
    "-ftrivial-auto-var-init=pattern",
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
]


class CompileError(RuntimeError):
    """A shader does not compile; the message is the compiler's, with the shader's lines."""


@functools.cache
def _zig() -> str:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise RuntimeError("the simulator needs clang: pip install ziglang")
    return str(Path(spec.origin).parent / "zig")


@functools.cache
def clang() -> tuple[str, ...]:
    """The command of the shader compiler: GLM_FUSED_SIM_CLANG (clang 19 or later), or ziglang's."""
    named = os.environ.get("GLM_FUSED_SIM_CLANG")
    return (named,) if named else (_zig(), "clang")


@functools.cache
def linker() -> tuple[str, ...]:
    named = os.environ.get("GLM_FUSED_SIM_CLANG")
    return (named, "-fuse-ld=lld", "-nostdlib") if named else (_zig(), "ld.lld")


@functools.cache
def cxx() -> tuple[str, ...]:
    """The command of the executor's compiler: CXX, else the system's, else ziglang's."""
    found = os.environ.get("CXX") or shutil.which("c++")
    return (found,) if found else (_zig(), "c++")


@functools.cache
def version() -> str:
    return run([*clang(), "--version"]) + " ".join([*clang(), *shader_flags(False, False)])


def run(command: Sequence[str], stdin: str | None = None) -> str:
    """Run a command and return its standard output; CompileError has its diagnostics."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr.strip() or f"{command[0]} failed ({done.returncode})")
    return done.stdout


def preprocess(source: str | Path, include_dirs: Sequence[Path], defines: dict[str, str]) -> str:
    """Preprocess shader text, given as a str or a file's Path; the result has line markers.

    Raises FileNotFoundError for a missing file and CompileError as `run` does."""
    # The address spaces and vector types are known before any #include.
    command = [*clang(), *_DIALECT, *_QUIET, "-E", "-I", str(HEADERS), "-include", "entry.h"]
    for directory in include_dirs:
        command += ["-I", str(directory)]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    if isinstance(source, Path):
        if not source.is_file():
            raise FileNotFoundError(f"no shader file {source}")
        return run([*command, str(source)])
    return run([*command, "-"], stdin=f'#line 1 "source.metal"\n{source}')


def shader_flags(contract: bool, trace: bool) -> list[str]:
    contraction = f"-ffp-contract={'on' if contract else 'off'}"
    return [*_DIALECT, *_QUIET, *_ARITHMETIC, *_CODE, contraction, *(_TRACE if trace else [])]


def compile_shader(text: Path, target: Path, contract: bool, trace: bool) -> None:
    """Compile preprocessed text; a CompileError names Metal's address spaces, not clang's."""
    flags = shader_flags(contract, trace)
    try:
        run([*clang(), *flags, "-c", str(text), "-o", str(target)])
    except CompileError as problem:
        told = re.sub("__(global|local|constant|private)", lambda m: _SPACES[m[1]], str(problem))
        raise CompileError(told) from None


def compile_c(text: Path, target: Path) -> None:
    machine = ("-target", f"{MACHINE}-linux-gnu")
    run([*clang(), *machine, "-O1", "-fPIC", "-w", "-c", str(text), "-o", str(target)])


def link(objects: Sequence[Path], needed: Path, target: Path) -> None:
    """Link `objects` to a shared object that loads `needed` with it."""
    run([*linker(), "-shared", *map(str, [*objects, needed]), "-o", str(target)])
