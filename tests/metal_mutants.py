"""Changed shaders, run by the real launchers in place of the right ones.

Several changed kernels are compiled into one library, each in a namespace of its own. Of the
changes of a kernel that a case shows, the first and every third after it run by default, the others
with -m slow.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import pytest
from metal_backend import COMPILERS, metal, split_instance
from shader_texts import mlx_arithmetic
from sim.compiler import compile_library
from sim.host import Launch, compiled

from glm_fused.ops import metal_sim

_BATCH = 16
_EACH = 3  # one of so many changes of a kernel in a case runs by default
_SHARED = """#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""
_OURS = re.compile(
    r"\b((?:moe_gate_up|moe_down_sum|router_logits|router_select|index_scores|index_prompt|index_select|mla_split|mla_prompt|rms_norm"
    r"|layer_norm|rotate_rows|copy_rows|copy_pair|pack_rows|project|grouped_gate_up|grouped_down|attention_queries|mla_unembed|Affine|Dense|Gguf|Fp8?"
    r"|FloatRows)<"
    r"|(?:Fp8Rows|Int8Rows|glm_fused::(?:Fp8|Int8)Packing|gguf::\w+)\b)"
)
# A kernel reads these buffers once, or twice, and a mutant may not read more of them.
_FRUGAL = {
    "moe_gate_up": (2,),
    "moe_down_sum": (2,),
    "group_pairs": (0,),
    "grouped_gate_up": (0, 2, 5),
    "grouped_down": (0, 2),
    "expert_sum": (0, 1),
    "router_logits": (0, 1),
    "router_select": (0, 1),
    "index_scores": (0, 1, 2),
    "index_prompt": (0, 1, 2),
    "index_select": (0, 4),
    "mla_split": (0, 1, 2, 3),
    "mla_combine": (0, 1, 2),
    "mla_prompt": (1, 2),
    "rms_norm": (0, 1),
    "layer_norm": (0, 1, 2),
    "rotate_rows": (0, 1, 2),
    "copy_rows": (0,),
    "copy_pair": (0, 3),
    "pack_rows": (0, 1),
    "project": (3, 6, 9, 12),
    "attention_queries": (1,),
    "mla_unembed": (3,),
}


class Case(Protocol):
    """The arguments of an op; equal cases are the same one."""

    @property
    def tiles(self) -> tuple[int, int, int, int] | None:
        """The value of GLM_FUSED_METAL_TILES, or None to leave it unset."""

    def run(self) -> Any:
        """The op's arrays."""


@dataclass(frozen=True)
class Mutation:
    """A change of a case's kernel, in the `nth` place that has its text.

    The text has @old@new@ where the change is."""

    name: str
    case: Any
    kernel: str
    change: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.kernel}: {self.name}"

    def apply(self, text: str) -> str:
        before, old, new, after = self.change.split("@")
        parts = text.split(before + old + after)
        assert len(parts) > self.nth + 1, f"{self}: {before + old + after!r} is not in the shader"
        left, right = parts[: self.nth + 1], parts[self.nth + 1 :]
        whole = before + old + after
        return whole.join(left) + before + new + after + whole.join(right)


@dataclass
class Right:
    """A case on the unchanged shaders: its traced launches, and what the launchers compiled."""

    launches: list[Launch] = field(default_factory=list)
    # The texts of a kernel's instances, by their names.
    texts: dict[str, dict[str, str]] = field(default_factory=dict)


def kernel_of(name: str) -> str:
    """The name of a kernel's function, given its host name."""
    return next(k for k in _FRUGAL if name.removeprefix("glm_fused_").startswith(k))


def _own_text(text: str) -> str:
    """The shader without system headers and MLX's arithmetic, which all mutants share."""
    text = text.replace(mlx_arithmetic(), "")
    text = re.sub(r"^#include <.*\n", "", text, flags=re.M)
    # A plain kernel would be in the library under its own name once per namespace.
    return re.sub(r"(?<!>\n)^(\[\[kernel.*\]\] void)", r"template <int>\n\1", text, flags=re.M)


class Mutants:
    """Tells mutations from the right shaders."""

    def __init__(self, *tables: list[Mutation]) -> None:
        """`tables` are lists of mutations, of each of which some run by default."""
        self._rights: dict[Any, Right] = {}
        self._libraries: dict[tuple[Mutation, ...], Future[Path]] = {}
        self._slow: set[Mutation] = set()
        for table in tables:
            seen = Counter[tuple[Any, str]]()
            for m in table:
                if seen[m.case, m.kernel] % _EACH:
                    self._slow.add(m)
                seen[m.case, m.kernel] += 1
        every = [m for table in tables for m in table]
        # A run that takes one of the two alone compiles nothing of the other.
        self._series = [
            _batches([m for m in every if (m in self._slow) == slow]) for slow in (False, True)
        ]

    def params(self, table: list[Mutation]) -> list[Any]:
        """A table's mutations as pytest's parameters."""
        slow = pytest.mark.slow
        return [pytest.param(m, marks=[slow] if m in self._slow else []) for m in table]

    def right(self, case: Case) -> Right:
        if case not in self._rights:
            right = Right()

            def compiler(name: str, text: str) -> tuple[Path, str]:
                right.texts.setdefault(kernel_of(name), {})[name] = text
                return compiled(name, text, contract=True, trace=True)

            right.launches = _launches(case, compiler)
            self._rights[case] = right
        return self._rights[case]

    def caught_by(self, m: Mutation) -> str:
        """What tells the changed shader from the right one: the tracer, the results or the traffic.

        Empty where nothing does.
        """
        usual = [x for x in self.right(m.case).launches if kernel_of(x.kernel) == m.kernel]
        compiler = self._compiler(m)
        self._library(m)[1].result()  # a change that does not compile is not caught by a run
        try:
            launches = _launches(m.case, compiler)
        except RuntimeError as problem:
            metal_sim.take_launches()
            return f"error: {problem}"
        seen = [x for x in launches if kernel_of(x.kernel) == m.kernel]
        assert len(seen) == len(usual)
        for a, b in zip(seen, usual, strict=True):
            if not a.report.clean:
                return a.report.findings[0].kind
            if a.outputs != b.outputs:
                return "results"
            if any(a.report.traffic[i].read > b.report.traffic[i].read for i in _FRUGAL[m.kernel]):
                return "traffic"
        return ""

    def _compiler(self, m: Mutation) -> Callable[[str, str], tuple[Path, str] | None]:
        order = [kernel_of(x.kernel) for x in self.right(m.case).launches]
        batch, library = self._library(m)

        def compiler(name: str, text: str) -> tuple[Path, str] | None:
            kernel = kernel_of(name)
            if kernel == m.kernel:
                return library.result(), f"mutant_{batch.index(m)}_"
            if order.index(kernel) > order.index(m.kernel):
                return None  # kernels after the changed one are of no interest and do not run
            return compiled(name, text, contract=True, trace=False)

        return compiler

    def _library(self, m: Mutation) -> tuple[tuple[Mutation, ...], Future[Path]]:
        series = self._series[m in self._slow]
        at = next(i for i, batch in enumerate(series) if m in batch)
        for batch in series[at : at + 2]:  # the next one is compiled meanwhile
            if batch not in self._libraries:
                text = self._text(batch)
                made = COMPILERS.submit(compile_library, text, contract=True, trace=True)
                self._libraries[batch] = made
        return series[at], self._libraries[series[at]]

    def _text(self, batch: tuple[Mutation, ...]) -> str:
        namespaces, instances = [], []
        for i, m in enumerate(batch):
            right = self.right(m.case).texts[m.kernel]
            own = _own_text(split_instance(next(iter(right.values())))[0])
            namespaces.append(f"namespace mutant_{i} {{\n{m.apply(own)}\n}}\n")
            instances += [_instance(i, host, text) for host, text in right.items()]
        return "".join([_SHARED, mlx_arithmetic(), *namespaces, *instances])


def _batches(mutations: list[Mutation]) -> list[tuple[Mutation, ...]]:
    """The mutations of each kernel, in parts that make a library each."""
    kernels: dict[str, list[Mutation]] = {}
    for m in mutations:
        kernels.setdefault(m.kernel, []).append(m)
    return [
        tuple(group[i : i + _BATCH])
        for group in kernels.values()
        for i in range(0, len(group), _BATCH)
    ]


def _instance(i: int, host: str, text: str) -> str:
    """The line that makes the instance `host` of the i-th changed kernel."""
    line = split_instance(text)[1]
    if line:
        here = _OURS.sub(rf"mutant_{i}::\1", re.search(r"decltype\((.*)\) ", line)[1])
    else:
        host = host_function(host)
        here = f"mutant_{i}::{host}<0>"
    return f'template [[host_name("mutant_{i}_{host}")]] [[kernel]] decltype({here}) {here};\n'


def host_function(library: str) -> str:
    """The name of a plain kernel, given its library's name."""
    return library.removeprefix("glm_fused_")


def _launches(case: Case, compiler: Any) -> list[Launch]:
    with metal(tiles=case.tiles, compiler=compiler, keep_outputs=True):
        mx.eval(case.run())
    return metal_sim.take_launches()
