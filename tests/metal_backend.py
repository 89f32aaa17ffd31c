"""Runs ops that have Metal kernels where tests can: on a Mac's GPU, or on the simulated host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from sim.compiler import compile_library

from glm_fused.ops import metal_sim

GPU = mx.metal.is_available()
simulated_only = pytest.mark.skipif(GPU, reason="tells of the simulator's launches")
COMPILERS = ThreadPoolExecutor(2)
_INSTANCE = "template [[host_name("


@contextlib.contextmanager
def metal(*, tiles=None, **settings):
    """Within the block, ops with Metal kernels run them, on whatever there is.

    `tiles` are GLM_FUSED_METAL_TILES, `settings` the simulated host's.
    """
    with pytest.MonkeyPatch.context() as patch:
        if tiles is not None:
            patch.setenv("GLM_FUSED_METAL_TILES", ",".join(map(str, tiles)))
        if GPU:
            yield
            return
        reason = metal_sim.unavailable()
        if reason:
            pytest.fail(reason)
        metal_sim.take_launches()
        with metal_sim.simulated(**settings):
            yield


@contextlib.contextmanager
def cpu():
    """Within the block, everything runs on the CPU."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def on_both(op):
    """The op's arrays as Metal computes them and as the CPU does."""
    with metal():
        there = op()
        mx.eval(there)
    with cpu():
        here = op()
        mx.eval(here)
    return there, here


def split_instance(text: str) -> tuple[str, str]:
    """Split a launcher's text: the shader, and the line that makes a template's instance or ""."""
    source, found, line = text.rpartition(_INSTANCE)
    return (source, found + line) if found else (text, "")


class Batches:
    """Makes the libraries of many cases, several kernels in each.

    A launcher asks for one library per kernel. Most of a compilation is spent on what all kernels
    of a shader share, so tests of many kernels run on these libraries instead.
    """

    _SIZE = 24

    def __init__(self, run: Callable[[Any], Any], cases: Iterable[Any]) -> None:
        """`run` makes the arrays of a case; what they hold does not matter."""
        self._run, self._cases = run, list(cases)
        self._texts: dict[str, str] = {}  # the text of a batch, by the names of its kernels
        self._libraries: dict[tuple[str, bool, bool], Future[Path]] = {}

    def compiler(self, *, contract: bool, trace: bool) -> Callable[[str, str], tuple[Path, str]]:
        """The simulated host's compiler; call this before the host runs anything."""
        if not self._texts:
            self._collect()

        def library(name: str, text: str) -> tuple[Path, str]:
            whole = self._texts.get(name, text)
            texts = list(dict.fromkeys(self._texts.values()))
            at = texts.index(whole) if whole in texts else len(texts)
            for one in [whole, *texts[at + 1 : at + 2]]:  # the next is compiled meanwhile
                self._start(one, contract, trace)
            return self._libraries[whole, contract, trace].result(), ""

        return library

    def _start(self, text: str, contract: bool, trace: bool) -> None:
        if (text, contract, trace) not in self._libraries:
            made = COMPILERS.submit(compile_library, text, contract=contract, trace=trace)
            self._libraries[text, contract, trace] = made

    def _collect(self) -> None:
        """Ask the launchers what they compile for each case, and run nothing."""
        lines: dict[str, dict[str, str]] = {}  # the lines of instances, by shader and name

        def note(name: str, text: str) -> None:
            source, line = split_instance(text)
            lines.setdefault(source, {})[name] = line

        with metal_sim.simulated(compiler=note):
            for case in self._cases:
                mx.eval(self._run(case))
        metal_sim.take_launches()
        for source, instances in lines.items():
            names = list(instances)
            for first in range(0, len(names), self._SIZE):
                batch = names[first : first + self._SIZE]
                text = source + "".join(instances[name] for name in batch)
                self._texts |= dict.fromkeys(batch, text)
