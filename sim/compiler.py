"""Makes a shader library, which the executor loads, from Metal source."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cache, toolchain
from .kernels import EntryPoint, FunctionConstant
from .rewrite import Rewritten, rewrite
from .tokens import SyntaxProblem

_C_TYPES = {"bool": "_Bool", "half": "unsigned short"} | {
    t: f"unsigned {t[1:]}" for t in ("uchar", "ushort", "uint", "ulong")
}
_KINDS = {"buffer": 0, "threadgroup": 1, "position": 2}


@functools.cache
def _own_sources() -> str:
    """This package's own text, on which a library depends besides its shader."""
    here = toolchain.HERE
    files = sorted([*here.glob("runtime/*"), *here.glob("*.py")])
    return "".join(f.read_text() for f in files if f.is_file())


@functools.cache
def executor() -> Path:
    """The executor's shared object, which is built on first use."""
    sources = sorted((toolchain.HERE / "runtime").glob("*"))
    text = "".join(s.read_text() for s in sources)
    command = [*toolchain.cxx(), "-std=c++20", "-O2", "-fPIC", "-shared"]
    command += ["-ftls-model=initial-exec", "-pthread"]
    # A libstdc++ loaded this late may find no room left for its thread-local variables.
    command += ["-static-libstdc++", "-static-libgcc"]

    def build(scratch: Path) -> Path:
        # It is one translation unit, because the standard headers are most of the work.
        unit, target = scratch / "executor.cpp", scratch / "executor.so"
        unit.write_text("".join(f'#include "{s}"\n' for s in sources if s.suffix == ".cpp"))
        toolchain.run([*command, str(unit), "-o", str(target), "-lm", "-ldl"])
        return target

    return cache.cached(f"executor-{cache.key(text, *command)}.so", build).absolute()


def compile_library(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, str] | None = None,
    contract: bool = False,
    trace: bool = False,
) -> Path:
    """The shared object of a shader; see `sim.library.compile` for the arguments.

    It is cached by the preprocessed text, the flags, the compiler and this package. Raises
    CompileError with the compiler's diagnostics."""
    directories = [Path(d) for d in include_dirs]
    text = toolchain.preprocess(source, directories, dict(defines or {}))
    flags = " ".join(toolchain.shader_flags(contract, trace))
    parts = (text, flags, toolchain.version(), _own_sources(), str(executor()))
    return cache.cached(
        f"shader-{cache.key(*parts)}.so",
        lambda scratch: _build(scratch, text, contract, trace),
    )


def _build(scratch: Path, text: str, contract: bool, trace: bool) -> Path:
    try:
        rewritten = rewrite(text, str(toolchain.HEADERS))
    except SyntaxProblem as problem:
        raise toolchain.CompileError(str(problem)) from None
    shader, table = scratch / "shader.clcpp", scratch / "table.c"
    shader.write_text(rewritten.text + _entry_points(rewritten.entries))
    table.write_text(_table(rewritten, trace))
    objects = [scratch / "shader.o", scratch / "table.o"]
    toolchain.compile_shader(shader, objects[0], contract, trace)
    toolchain.compile_c(table, objects[1])
    target = scratch / "library.so"
    toolchain.link(objects, executor(), target)
    return target


def _entry_points(entries: Sequence[EntryPoint]) -> str:
    lines = ['\n# 1 "entry points"']
    for i, entry in enumerate(entries):
        lines.append(
            f'extern "C" void sim_entry_{i}(const __private ulong* buffers, '
            "const __private ulong* groups, const __private msl_position* at) "
            f"{{ {entry.expression}({', '.join(entry.passed)}); }}"
        )
        if entry.most_threads:
            lines.append(
                f'extern "C" uint sim_most_threads_{i}() {{ return {entry.most_threads}; }}'
            )
    return "\n".join(lines) + "\n"


def _table(rewritten: Rewritten, trace: bool) -> str:
    """The C source of the library's `sim_exports` and of its function constants."""
    header = toolchain.HERE / "runtime" / "executor.h"
    text = header.read_text().replace("#include <stddef.h>", "typedef __SIZE_TYPE__ size_t;")
    text = text.replace(
        "#include <stdint.h>",
        "\n".join(f"typedef __{n}_TYPE__ {n.lower()}_t;" for n in _INTEGERS),
    )
    constants = {c.index: c for c in rewritten.constants}
    lines = [text]
    lines += [_constant_storage(c) for c in constants.values()]
    for i, entry in enumerate(rewritten.entries):
        lines.append(f"void sim_entry_{i}(const uint64_t*, const uint64_t*, const void*);")
        lines.append(_arguments(i, entry))
        if entry.most_threads:
            lines.append(f"uint32_t sim_most_threads_{i}(void);")
    kernels = ",\n".join(
        f'{{"{e.name}", sim_entry_{i}, arguments_{i}, {len(e.arguments)}, '
        f"{f'sim_most_threads_{i}' if e.most_threads else '0'}}}"
        for i, e in enumerate(rewritten.entries)
    )
    shown = ",\n".join(
        f'{{"{c.name}", "{c.type}", {c.index}, sizeof(sim_constant_{c.index}), '
        f"&sim_constant_{c.index}}}"
        for c in constants.values()
    )
    lines.append(f"static const sim_kernel kernels[] = {{{kernels or '{0}'}}};")
    lines.append(f"static const sim_function_constant constants[] = {{{shown or '{0}'}}};")
    lines.append(
        f"const sim_contents sim_exports = {{kernels, constants, {len(rewritten.entries)}, "
        f"{len(constants)}, {int(trace)}}};"
    )
    return "\n".join(lines) + "\n"


_INTEGERS = ("INT32", "INT64", "UINT8", "UINT32", "UINT64")


def _constant_storage(constant: FunctionConstant) -> str:
    kind = constant.type.removesuffix("_t")
    if kind.startswith(("int", "uint")) and kind[-1].isdigit():
        kind = f"__{kind.upper()}_TYPE__"
    return f"{_C_TYPES.get(kind, kind)} sim_constant_{constant.index};"


def _arguments(i: int, entry: EntryPoint) -> str:
    rows = ",\n".join(
        f"{{{_KINDS[a.kind]}, {a.index}, {int(a.writable)}, {int(a.reference)}, "
        f'"{a.name}", "{a.type}", "{a.space}"}}'
        for a in entry.arguments
    )
    return f"static const sim_argument arguments_{i}[] = {{{rows or '{0}'}}};"
