"""How many tokens to draft: a fixed number, or what pays by the costs and acceptance so far."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import mlx.nn as nn

from ..limits import AUTO, MOST_DRAFTS

DEPTHS = (1, 2, 3, 4, 6, 8)  # that `AUTO` chooses among: each is a step of its own to record
BURST = 6  # plain steps in a row that are measured first
AGAIN, BETWEEN = 3, 256  # and how many later, after so many tokens
_EXPLORE = 16  # drafts of a kind after which one is a little deeper
_LOSS = (
    0.015  # of the time, that drafts which do not pay may take to find out that they still do not
)
_WAIT = 32  # tokens at least until the next such draft
_USUAL_COST, _USUAL_ACCEPTANCE = 0.3, 0.7  # a draft's, in plain steps, until it is measured


class Average:
    """An average of samples, in which the latest weigh the most.

    A new one has at least ``weight``, and as much as each of those before while they are few.
    """

    def __init__(self, weight: float, value: float):
        self.value, self._weight, self._count = value, weight, 1

    def add(self, sample: float) -> None:
        self._count += 1
        self.value += max(self._weight, 1 / self._count) * (sample - self.value)


class Costs:
    """What steps with each number of drafts cost, drafting included, as a multiple of plain steps.

    It serves one text after the other: costs are the model's and the machine's.
    """

    def __init__(self) -> None:
        self.plain: Average | None = None  # seconds
        self._ratios: dict[int, Average | None] = {}

    def add_plain(self, seconds: float) -> None:
        """Count a plain step; what interrupts it counts as twice the average at most."""
        if self.plain is None:
            self.plain = Average(0.2, seconds)
        else:
            self.plain.add(min(seconds, 2 * self.plain.value))

    def add(self, depth: int, seconds: float) -> None:
        """Count a step with drafts, after a plain one.

        The first with so many prepares others, and is left out.
        """
        assert self.plain is not None
        ratio = seconds / self.plain.value
        average = self._ratios.get(depth)
        if average is not None:
            average.add(min(ratio, 2 * average.value))
        else:
            self._ratios[depth] = Average(0.2, ratio) if depth in self._ratios else None

    def of(self, depth: int) -> float:
        """What a step costs; what was not seen is on a line with what was."""
        known = {0: 1.0} | {d: average.value for d, average in self._ratios.items() if average}
        if depth in known:
            return known[depth]
        below = max(d for d in known if d < depth)
        above = min((d for d in known if d > depth), default=None)
        if above is not None:
            slope = (known[above] - known[below]) / (above - below)
        else:
            slope = max(known[below] - 1, 0) / below if below else _USUAL_COST
        return known[below] + slope * (depth - below)


class Acceptance:
    """How often each draft of one kind stays where those before it do."""

    def __init__(self) -> None:
        self._rates = [Average(1 / 32, _USUAL_ACCEPTANCE) for _ in range(MOST_DRAFTS)]
        self.rounds = 0

    def add(self, depth: int, kept: int) -> None:
        """Count a step with ``depth`` drafts that kept some of them."""
        self.rounds += 1
        for i in range(min(kept + 1, depth)):
            self._rates[i].add(float(i < kept))
        for rate, before in zip(self._rates[depth:], self._rates[depth - 1 :], strict=False):
            rate.add(before.value)  # nothing is known of those that were not made

    def tokens(self, depth: int) -> float:
        """How many tokens a step with ``depth`` drafts is expected to give."""
        rates = [rate.value for rate in self._rates[:depth]]
        return sum(accumulate(rates, mul), 1.0)


class Depth:
    """Decides how many tokens to draft, one step after the other.

    With a number for ``wanted`` it is always that one, after some plain steps that are measured.
    With `AUTO` it is the one with the most expected tokens a second, 0 where plain steps have; then
    a draft is made from time to time, so seldom that those take little time in all, since a text
    may begin to suit.

    Args:
        wanted: a number up to `MOST_DRAFTS`, or `AUTO`.
        most: how many may be drafted at most.
        costs: those of the texts before.
    """

    def __init__(
        self, wanted: int | str, most: int = MOST_DRAFTS, costs: Costs | None = None
    ) -> None:
        self._auto = wanted == AUTO
        self._depths = [d for d in DEPTHS if d <= most] if self._auto else [min(int(wanted), most)]
        self._kinds: dict[int, Acceptance] = {}
        self._bests: dict[int, int] = {}  # by kind, until there is another draft
        self._costs = costs or Costs()
        # A fixed number makes the same steps of every text, so that a seed draws the same tokens.
        unknown = self._auto and self._costs.plain is None
        self._plain, self._since = BURST if unknown else AGAIN, 0
        self._wait = _WAIT

    @property
    def plain_seconds(self) -> float | None:
        """What a plain step costs; None where there was none like others."""
        return None if self._costs.plain is None else self._costs.plain.value

    def next(self, kind: int | None, most: int) -> int:
        """How many tokens to draft of a ``kind``, up to ``most``; 0 for a plain step.

        Drafts of kind None cannot be made.
        """
        if kind is None or most < 1 or self._plain:
            return 0
        if not self._auto:
            return min(self._depths[0], most)
        best = self._bests.get(kind)
        if best == 0 and self._wait > 0:  # most steps of a text that does not suit
            return 0
        seen = self._kinds.setdefault(kind, Acceptance())
        depths = [depth for depth in self._depths if depth <= most]
        if best is None or best > most:
            best = self._bests[kind] = self._best(seen, depths)
        if not best:
            return 0 if self._wait > 0 else self._informative(depths)
        explore = seen.rounds % _EXPLORE == _EXPLORE - 1
        deeper = [depth for depth in depths if depth > best]
        return deeper[0] if explore and deeper else best

    def count_plain(self, seconds: float | None) -> None:
        """A plain step took so long; None where it was not like others."""
        if seconds is not None:
            self._costs.add_plain(seconds)
            self._plain, self._since = max(self._plain - 1, 0), 0
        self._pass(1)

    def count(self, kind: int, depth: int, kept: int, seconds: float) -> None:
        """A step with ``depth`` drafts of a ``kind``, of which it kept some, took so long."""
        self._costs.add(depth, seconds)
        self._bests.clear()
        self._pass(1 + kept)
        seen = self._kinds.setdefault(kind, Acceptance())
        seen.add(depth, kept)
        if not self._auto:
            return
        cost = self._costs.of(depth)
        pays = kept == depth and 1 + depth > cost
        if pays or self._best(seen, self._depths):
            self._wait = 0
        else:
            self._wait = max(_WAIT, int((cost - seen.tokens(depth)) / _LOSS))
        if self._since >= BETWEEN:
            self._plain = AGAIN

    def _pass(self, tokens: int) -> None:
        self._since += tokens
        self._wait -= tokens

    def _best(self, seen: Acceptance, depths: list[int]) -> int:
        return max((0, *depths), key=lambda depth: seen.tokens(depth) / self._costs.of(depth))

    def _informative(self, depths: list[int]) -> int:
        """The depth that would pay most if all drafts stayed."""
        return max(depths, key=lambda depth: (1 + depth) / self._costs.of(depth), default=0)


def costs_of(model: nn.Module, source: str) -> Costs:
    """The costs of a model's steps with drafts from a ``source``, which it keeps."""
    kept: dict[str, Costs] = model.__dict__.setdefault("_draft_costs", {})
    return kept.setdefault(source, Costs())
