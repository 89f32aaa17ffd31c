"""Which tokens to draft: so many, or what pays by the costs and acceptance so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import mlx.nn as nn

from ..limits import AUTO, MOST_DRAFTS
from .drafter import Kind

DEPTHS = (1, 2, 3, 4, 6, 8)  # that `AUTO` chooses among: each is a step of its own to record
BURST = 6  # plain steps in a row that are measured first
AGAIN, BETWEEN = 3, 256  # and how many later, after so many tokens
_EXPLORE = 16  # drafts of a kind after which one is a little deeper
_LOSS = (
    0.015  # of the time, that drafts which do not pay may take to find out that they still do not
)
_WAIT = 32  # tokens at least until the next such draft
_USUAL_COST, _USUAL_ACCEPTANCE = 0.3, 0.7  # a draft's, in plain steps, until it is measured


class Plan(NamedTuple):
    """Drafts to make: of which kind, and how many tokens."""

    kind: Kind
    depth: int


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
    """What steps with so many drafts cost, drafting included, as a multiple of plain steps.

    Each source of drafts has costs of its own. They serve one text after the other: costs are the
    model's and the machine's.
    """

    def __init__(self) -> None:
        self.plain: Average | None = None  # seconds
        self._ratios: dict[str, dict[int, Average | None]] = {}

    def add_plain(self, seconds: float) -> None:
        """Count a plain step; what interrupts it counts as twice the average at most."""
        if self.plain is None:
            self.plain = Average(0.2, seconds)
        else:
            self.plain.add(min(seconds, 2 * self.plain.value))

    def add(self, source: str, depth: int, seconds: float) -> None:
        """Count a step with drafts, after a plain one.

        The first with so many prepares others, and is left out.
        """
        assert self.plain is not None
        ratio = seconds / self.plain.value
        ratios = self._ratios.setdefault(source, {})
        average = ratios.get(depth)
        if average is not None:
            average.add(min(ratio, 2 * average.value))
        else:
            ratios[depth] = Average(0.2, ratio) if depth in ratios else None

    def of(self, source: str, depth: int) -> float:
        """What a step costs; what was not seen is on a line with what was."""
        ratios = self._ratios.get(source, {})
        known = {0: 1.0} | {d: average.value for d, average in ratios.items() if average}
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
    """Decides how many tokens to draft, and of which kind, one step after the other.

    With a number for ``wanted`` it is always that one, after some plain steps that are measured,
    and the kind of which most are expected to stay. With `AUTO` number and kind are those with the
    most expected tokens a second; none where plain steps have more. Then a draft is made from time
    to time, so seldom that those take little time in all, since a text may begin to suit.

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
        self._kinds: dict[Kind, Acceptance] = {}
        self._bests: dict[Kind, tuple[float, int]] = {}  # gains and numbers, until the next draft
        self._costs = costs or Costs()
        # A fixed number makes the same steps of every text, so that a seed draws the same tokens.
        unknown = self._auto and self._costs.plain is None
        self._plain, self._since = BURST if unknown else AGAIN, 0
        self._wait = _WAIT

    @property
    def plain_seconds(self) -> float | None:
        """What a plain step costs; None where there was none like others."""
        return None if self._costs.plain is None else self._costs.plain.value

    def next(self, kinds: Sequence[Kind], most: int) -> Plan | None:
        """Which drafts to make, up to ``most`` of one of these kinds; None for a plain step."""
        if not kinds or most < 1 or self._plain:
            return None
        if not self._auto:
            depth = min(self._depths[0], most)
            return Plan(max(kinds, key=lambda kind: self._seen(kind).tokens(depth)), depth)
        (gain, depth), kind = max((self._best(kind, most), kind) for kind in kinds)
        if gain <= 1:  # most steps of a text that does not suit
            return None if self._wait > 0 else self._informative(kinds, most)
        explore = self._seen(kind).rounds % _EXPLORE == _EXPLORE - 1
        deeper = [each for each in self._depths if depth < each <= most]
        return Plan(kind, deeper[0] if explore and deeper else depth)

    def count_plain(self, seconds: float | None) -> None:
        """A plain step took so long; None where it was not like others."""
        if seconds is not None:
            self._costs.add_plain(seconds)
            self._plain, self._since = max(self._plain - 1, 0), 0
        self._pass(1)

    def count(self, plan: Plan, kept: int, seconds: float, before: float = 0.0) -> None:
        """A step with such drafts, of which it kept some, took so long.

        ``before`` it, what former plain steps had left to do took seconds besides.
        """
        (kind, depth), seen = plan, self._seen(plan.kind)
        self._costs.add(kind.source, depth, seconds)
        self._bests.clear()
        self._pass(1 + kept)
        seen.add(depth, kept)
        if not self._auto:
            return
        cost = self._costs.of(kind.source, depth)
        pays = kept == depth and 1 + depth > cost
        if pays or self._best(kind, MOST_DRAFTS)[0] > 1:
            self._wait = 0
        else:
            left = before / (self.plain_seconds or before or 1)
            self._wait = max(_WAIT, int((cost + left - seen.tokens(depth)) / _LOSS))
        if self._since >= BETWEEN:
            self._plain = AGAIN

    def _pass(self, tokens: int) -> None:
        self._since += tokens
        self._wait -= tokens

    def _seen(self, kind: Kind) -> Acceptance:
        return self._kinds.setdefault(kind, Acceptance())

    def _best(self, kind: Kind, most: int) -> tuple[float, int]:
        """How many times as fast as plain steps those with the best number are, and the number."""
        best = self._bests.get(kind)
        if best is None or best[1] > most:
            depths = [depth for depth in self._depths if depth <= most]
            best = max(((self._gain(kind, depth), depth) for depth in depths), default=(0.0, 0))
            self._bests[kind] = best
        return best

    def _gain(self, kind: Kind, depth: int) -> float:
        return self._seen(kind).tokens(depth) / self._costs.of(kind.source, depth)

    def _informative(self, kinds: Sequence[Kind], most: int) -> Plan | None:
        """What would pay most if all drafts stayed, of the kind of which least is known."""
        kind = min(kinds, key=lambda kind: self._seen(kind).rounds)
        depths = [depth for depth in self._depths if depth <= most]
        if not depths:
            return None
        return Plan(kind, max(depths, key=lambda d: (1 + d) / self._costs.of(kind.source, d)))


def costs_of(model: nn.Module) -> Costs:
    """The costs of a model's steps, which it keeps."""
    kept: Costs = model.__dict__.setdefault("_draft_costs", Costs())
    return kept
