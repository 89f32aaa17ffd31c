"""Changed shaders, several in one library: each in a namespace of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sim
from metal_kernels import flatten, instance, shader

_BATCH = 8
_COMPILERS = ThreadPoolExecutor(2)
_SHARED = """#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""
_ARITHMETIC = flatten.mlx_arithmetic(sim.mlx_include())
_OURS = re.compile(r"\b(moe_gate_up|moe_down_sum|router_topk|Affine|Dense|Fp)<")


@dataclass(frozen=True)
class Mutation:
    """A change of the kernel of a case: a text with @old@new@ where it differs, the `nth` such."""

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


def _own_text(source: str) -> str:
    """The shader without what every mutant shares: system headers and MLX's arithmetic."""
    text = shader(source).replace(_ARITHMETIC, "")
    return re.sub(r"^#include <.*\n", "", text, flags=re.M)


class Mutants:
    """The mutations of one shader source; `function` names the instance a mutation shows in."""

    def __init__(
        self, source: str, mutations: list[Mutation], function: Callable[[Mutation], str]
    ) -> None:
        self._text = _own_text(source)
        self._function = function
        self._batches: dict[Mutation, tuple[Mutation, ...]] = {}
        self._libraries: dict[tuple[Mutation, ...], Future[Any]] = {}
        groups: dict[Any, list[Mutation]] = {}
        for m in mutations:
            groups.setdefault((m.case, m.kernel), []).append(m)
        for group in groups.values():
            for i in range(0, len(group), _BATCH):
                self._batches |= dict.fromkeys(group[i : i + _BATCH], tuple(group[i : i + _BATCH]))

    def find(self, m: Mutation) -> tuple[Any, str]:
        """The library that holds a mutation, traced and contracted, and its kernel's name."""
        batch = self._batches[m]
        batches = list(dict.fromkeys(self._batches.values()))
        at = batches.index(batch)
        for one in batches[at : at + 2]:  # the next one is compiled meanwhile
            if one not in self._libraries:
                self._libraries[one] = _COMPILERS.submit(self._compile, one)
        return self._libraries[batch].result(), self._qualified(batch, m)

    def _qualified(self, batch: tuple[Mutation, ...], m: Mutation) -> str:
        return _OURS.sub(rf"mutant_{batch.index(m)}::\1<", self._function(m))

    def _compile(self, batch: tuple[Mutation, ...]) -> Any:
        texts = [_SHARED + _ARITHMETIC]
        for i, m in enumerate(batch):
            texts.append(f"namespace mutant_{i} {{\n{m.apply(self._text)}\n}}\n")
        texts += [instance(self._qualified(batch, m)) for m in batch]
        return sim.compile("".join(texts), contract=True, trace=True)
