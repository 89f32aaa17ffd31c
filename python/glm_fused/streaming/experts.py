"""Routed experts that are read from disk as they are needed, into slots that stay resident."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from .. import _ext, ops
from ..host import to_numpy
from ..models.moe import Arrays, Meanwhile, Norm, Router, Weights, activations

T = TypeVar("T")

_reads: contextvars.ContextVar[_ext.SlotReads | None] = contextvars.ContextVar(
    "reads", default=None
)


def check_reads(cache: Sequence[Any] | None) -> _ext.SlotReads:
    """The record of the reads for ``cache``, which keeps it; a new one for None.

    Raises RuntimeError if a read failed. MLX keeps what it was evaluating then as if it were valid,
    so the rows of the cache are not to be trusted. Evaluating the logits of a forward raises the
    same error; evaluating its cache alone does not.
    """
    if cache is None:
        return _ext.SlotReads()
    reads = cache[0].__dict__.setdefault("_reads", _ext.SlotReads())
    assert isinstance(reads, _ext.SlotReads)
    if reads.error:
        raise RuntimeError(
            "[slots] this cache is of no use since an expert could not be read for it; begin with"
            f" a new one. It was {reads.error}"
        )
    return reads


@contextlib.contextmanager
def reads_for(cache: Sequence[Any] | None) -> Iterator[_ext.SlotReads]:
    """Within the block, reads of experts are recorded for ``cache``; raises as `check_reads`."""
    reads = check_reads(cache)
    token = _reads.set(reads)
    try:
        yield reads
    finally:
        _reads.reset(token)


class StreamedExperts(nn.Module):
    """`RoutedExperts` in place of ``SwitchMLP``: the same numbers, from a bank of slots.

    A decode step makes one request of the bank, which is resolved inside the lazy graph; on Metal
    it is part of the one node that half a layer is (`block`), unless it reads ahead. Where a
    prompt may need more experts than there are slots, the router's choice is awaited and the
    experts are taken in waves, each expert once. Each choice's output is rounded as moe_decode
    would round it and then summed as it would sum, so the result has the same bits.
    """

    def __init__(
        self,
        bank: _ext.SlotBank,
        experts: int,
        weights: tuple[ops.Weight, ops.Weight, ops.Weight],
        room: int,
    ):
        """Take ``weights`` from a bank for a layer of so many experts, up to ``room`` at a time."""
        super().__init__()
        self._bank, self._experts, self._weights, self._room = bank, experts, weights, room
        self._prefetch: Meanwhile | None = None

    @property
    def bank(self) -> _ext.SlotBank:
        """The bank of slots that experts are read into."""
        return self._bank

    def weights(self) -> tuple[ops.Weight, ops.Weight, ops.Weight]:
        """The weights [slots, …] of gate, up and down."""
        return self._weights

    def takes_at_once(self, choices: int) -> bool:
        """Whether the bank has a slot for each expert that may be chosen; see `RoutedExperts`."""
        return min(choices, self._experts) <= self._room

    def look_ahead(
        self,
        router: Callable[[mx.array], tuple[mx.array, mx.array]],
        following: StreamedExperts,
    ) -> None:
        """Read ahead, at each call, what the next layer's ``router`` chooses for this one's input.

        ``following`` are the experts of the next layer, whose bank reads them.
        """

        def prefetch(x: mx.array) -> mx.array:
            return _ext.slots_prefetch(following.bank, router(x)[0], x)

        self._prefetch = prefetch

    def __call__(
        self, x: mx.array, experts: mx.array, scores: mx.array, meanwhile: Meanwhile
    ) -> tuple[mx.array, mx.array]:
        """The sum [n, hidden] of each row's experts, and ``meanwhile(x)``; see `RoutedExperts`.

        ``meanwhile`` is computed while experts are read.
        """
        if not self.takes_at_once(experts.size):
            return self._in_waves(x, experts, scores, meanwhile)
        use, pending, started = self._resolve(experts)
        other = self._while_reading(x, started, meanwhile)
        return self._apply(use, x, pending, scores, other), other

    def part(
        self,
        x: mx.array,
        experts: mx.array,
        scores: mx.array,
        meanwhile: Callable[[mx.array], Arrays],
        join: Callable[[Arrays], Arrays],
    ) -> tuple[mx.array, Arrays]:
        """As `RoutedExperts`; all ranks take the same waves, whatever each has in its slots."""
        if self.takes_at_once(experts.size):
            use, pending, started = self._resolve(experts)
            beside = self._while_reading(x, started, meanwhile)
            y, other = self._part(use, x, mx.depends(pending, [started, *beside]), beside, join)
            return ops.expert_sum(y, scores), other
        waves = plan_waves(_known(experts), set(), self._wave_size)
        parts: list[mx.array] = []
        other = []
        for wave, use, pending, after in self._taken(waves):
            beside = [] if parts else self._while_reading(x, after, meanwhile)
            rows = x[mx.array(wave.pairs // experts.shape[1])]
            y, found = self._part(use, rows, mx.depends(pending, [after, *beside]), beside, join)
            parts.append(y)
            other += found
        return ops.expert_sum(_in_order(parts, waves, experts.shape), scores), other

    def block(
        self, router: Router, x: mx.array, norm: Norm, shared: Weights | None
    ) -> mx.array | None:
        """The half of a layer as one node, on Metal; see `RoutedExperts`."""
        fits = self.takes_at_once(router.choices(x))
        if not fits or self._prefetch is not None or not ops.blocks.takes_on_metal(x):
            return None
        return router.block(x, norm, self._weights, shared, self._use())

    def _while_reading(
        self, x: mx.array, started: mx.array, meanwhile: Callable[[mx.array], T]
    ) -> T:
        x = mx.depends(x, started)
        return meanwhile(x if self._prefetch is None else self._prefetch(x))

    def _resolve(self, experts: mx.array) -> tuple[_ext.SlotUse, mx.array, mx.array]:
        use = self._use()
        return use, *use.resolve(experts)

    def _use(self) -> _ext.SlotUse:
        return _ext.SlotUse(self._bank, _reads.get() or _ext.SlotReads())

    def _apply(
        self,
        use: _ext.SlotUse,
        x: mx.array,
        pending: mx.array,
        scores: mx.array,
        after: mx.array,
        prompt: bool | None = None,
    ) -> mx.array:
        slots = mx.depends(pending, after)
        y = ops.moe_decode(x, *self._weights, slots, scores, use=use, prompt=prompt)
        return use.release(y, slots)

    def _part(
        self,
        use: _ext.SlotUse,
        x: mx.array,
        slots: mx.array,
        beside: Arrays,
        join: Callable[[Arrays], Arrays],
    ) -> tuple[mx.array, Arrays]:
        """What each choice gives, [tokens, top_k, part], and what is joined ``beside``."""
        gate, up, down = self._weights
        read = use.wait(slots)
        joined, *other = join([activations(x, gate, up, read), *beside])
        return use.release(ops.expert_matvec(joined, down, read), slots), other

    def _in_waves(
        self, x: mx.array, experts: mx.array, scores: mx.array, meanwhile: Meanwhile
    ) -> tuple[mx.array, mx.array]:
        chosen = _known(experts)
        waves = plan_waves(chosen, set(self._bank.resident()), self._wave_size)
        ones = mx.ones((experts.size, 1))
        prompt = len(chosen) > ops.blocks.MAX_TOKENS  # and not how many of its pairs a wave has
        parts: list[mx.array] = []
        other: mx.array | None = None
        for wave, use, pending, after in self._taken(waves):
            if other is None:
                after = other = self._while_reading(x, after, meanwhile)
            rows = x[mx.array(wave.pairs // experts.shape[1])]
            parts.append(self._apply(use, rows, pending, ones[: len(wave.pairs)], after, prompt))
        assert other is not None  # there is a token, so there is a wave
        return ops.expert_sum(_in_order(parts, waves, experts.shape), scores), other

    @property
    def _wave_size(self) -> int:
        """Experts in a wave: two share the bank, of which one is read while the other computes."""
        return max(self._room // 2, 1)

    def _taken(
        self, waves: Sequence[Wave]
    ) -> Iterator[tuple[Wave, _ext.SlotUse, mx.array, mx.array]]:
        """Each wave with its use, its slots, and what has to be there before they are waited for.

        That is the beginning of reads, of the next wave, too, where the bank has room for two.
        """
        upcoming: tuple[_ext.SlotUse, mx.array, mx.array] | None = None
        for wave, following in zip_longest(waves, waves[1:]):
            use, pending, started = self._resolve(wave.experts) if upcoming is None else upcoming
            ahead = self._room > 1 and following is not None
            upcoming = self._resolve(following.experts) if ahead else None
            yield wave, use, pending, started if upcoming is None else upcoming[2]


def _known(experts: mx.array) -> NDArray[np.int32]:
    """What the router has chosen, which is awaited.

    Raises RuntimeError where an earlier layer's experts could not be read: its output is NaN.
    """
    chosen = to_numpy(experts)
    reads = _reads.get()
    if reads is not None and reads.error:
        raise RuntimeError(reads.error)
    return chosen


def _in_order(parts: list[mx.array], waves: Sequence[Wave], shape: tuple[int, ...]) -> mx.array:
    """What waves gave for each pair, in the order of the pairs: [tokens, top_k, …]."""
    order = np.argsort(np.concatenate([wave.pairs for wave in waves]))
    return mx.concatenate(parts)[mx.array(order)].reshape(*shape, -1)


class Wave(NamedTuple):
    """A part of a prompt's pairs of a token and one of its choices, for a few experts.

    A pair is the number ``token * top_k + choice``; ``experts`` [n, 1] has the expert of each.
    """

    pairs: NDArray[np.int64]
    experts: mx.array


def plan_waves(experts: NDArray[np.int32], resident: set[int], size: int) -> list[Wave]:
    """Split the pairs of ``experts`` [tokens, top_k] into waves of at most ``size`` experts.

    Every expert is in one wave; those that are resident come first, before others replace them.
    """
    flat = experts.reshape(-1)
    present = np.unique(flat)
    rank = np.empty(present[-1] + 1, np.int64)
    ordered = sorted(present.tolist(), key=lambda expert: (expert not in resident, expert))
    rank[ordered] = np.arange(len(ordered))
    pairs = np.argsort(rank[flat], kind="stable")
    bounds = np.searchsorted(rank[flat[pairs]], range(0, len(ordered) + size, size))
    waves = []
    for low, high in pairwise(bounds.tolist()):
        if low < high:
            chosen = pairs[low:high]
            waves.append(Wave(chosen, mx.array(flat[chosen][:, None])))
    return waves
