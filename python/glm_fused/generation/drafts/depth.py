"""How many tokens to draft: a fixed number, or what pays by the costs and acceptance so far."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

from ..limits import AUTO, MOST_DRAFTS

DEPTHS = (1, 2, 3, 4, 6, 8)  # that `AUTO` chooses among: each is a step of its own to record
BURST = 6  # plain steps in a row that are measured first
AGAIN, BETWEEN = 3, 256  # and how many later, after so many tokens
_EXPLORE = 16  # drafts of a kind after which one is a little deeper
_LOSS = (
    0.015  # of the time, that drafts which do not pay may take to find out that they still do not
)
_WAIT, _LONGEST_WAIT = 16, 1024  # tokens until the next such draft, at first and at most
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
    """Seconds of a step with each number of drafts, all that it takes to draft them included."""

    def __init__(self) -> None:
        self._seen: dict[int, Average | None] = {}

    def add(self, depth: int, seconds: float) -> None:
        """Count a step. The first with so many drafts prepares others, and is left out.

        What interrupts a step from outside counts as twice the average at most.
        """
        average = self._seen.get(depth)
        if average is not None:
            average.add(min(seconds, 2 * average.value))
        elif depth and depth not in self._seen:
            self._seen[depth] = None
        else:
            self._seen[depth] = Average(0.2, seconds)

    def of(self, depth: int) -> float | None:
        """What a step costs; None before any plain one. What was not seen is on a line."""
        known = {d: average.value for d, average in self._seen.items() if average is not None}
        if depth in known or 0 not in known:
            return known.get(depth)
        below = max(d for d in known if d < depth)
        above = min((d for d in known if d > depth), default=None)
        if above is not None:
            slope = (known[above] - known[below]) / (above - below)
        elif below:
            slope = max(known[below] - known[0], 0) / below
        else:
            slope = _USUAL_COST * known[0]
        return known[below] + slope * (depth - below)


class Acceptance:
    """How often each draft of one kind stays where those before it do."""

    def __init__(self) -> None:
        self._rates = [Average(1 / 32, _USUAL_ACCEPTANCE) for _ in range(MOST_DRAFTS)]
        self.rounds, self.wait, self._pause = 0, 0, _WAIT

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

    def rest(self, tokens: int) -> None:
        """Have no drafts made for so many tokens, or longer after each such time."""
        self._pause = min(2 * self._pause, _LONGEST_WAIT)
        self.wait = max(self._pause, tokens)

    def go_on(self) -> None:
        """Drafts may pay (again)."""
        self.wait, self._pause = 0, _WAIT


class Depth:
    """Decides how many tokens to draft, one step after the other.

    With a number for ``wanted`` it is always that one. With `AUTO` it is the one with the most
    expected tokens a second, 0 where plain steps have; then a draft is made from time to time, so
    seldom that those take little time in all, since a text may begin to suit.

    Args:
        wanted: a number up to `MOST_DRAFTS`, or `AUTO`.
        most: how many may be drafted at most.
    """

    def __init__(self, wanted: int | str, most: int = MOST_DRAFTS):
        self._auto = wanted == AUTO
        self._depths = [d for d in DEPTHS if d <= most] if self._auto else [min(int(wanted), most)]
        self._kinds: dict[int, Acceptance] = {}
        self._plain, self._since = BURST, 0
        self._costs = Costs()

    @property
    def plain_seconds(self) -> float | None:
        """What a plain step costs; None where there was none like others."""
        return self._costs.of(0)

    def next(self, kind: int | None, most: int) -> int:
        """How many tokens to draft of a ``kind``, up to ``most``; 0 for a plain step.

        Drafts of kind None cannot be made.
        """
        depths = [depth for depth in self._depths if depth <= most]
        if kind is None or most < 1 or self._plain:
            return 0
        if not self._auto:
            return min(self._depths[0], most)
        seen = self._kinds.setdefault(kind, Acceptance())
        best = self._best(seen, depths)
        if not best:
            return 0 if seen.wait > 0 else self._informative(depths)
        explore = seen.rounds % _EXPLORE == _EXPLORE - 1
        deeper = [depth for depth in depths if depth > best]
        return deeper[0] if explore and deeper else best

    def count_plain(self, seconds: float | None) -> None:
        """A plain step took so long; None where it was not like others."""
        if seconds is not None:
            self._costs.add(0, seconds)
            self._plain, self._since = max(self._plain - 1, 0), 0
        self._pass(1)

    def count(self, kind: int, depth: int, kept: int, seconds: float) -> None:
        """A step with ``depth`` drafts of a ``kind``, of which it kept some, took so long."""
        self._costs.add(depth, seconds)
        self._pass(1 + kept)
        seen = self._kinds.setdefault(kind, Acceptance())
        seen.add(depth, kept)
        if not self._auto:
            return
        if kept == depth or self._best(seen, self._depths):
            seen.go_on()
        else:
            seen.rest(int((self._cost(depth) - seen.tokens(depth) + 1) / _LOSS))
        if self._since >= BETWEEN:
            self._plain = AGAIN

    def _pass(self, tokens: int) -> None:
        self._since += tokens
        for seen in self._kinds.values():
            seen.wait -= tokens

    def _cost(self, depth: int) -> float:
        """What a step costs, in plain ones."""
        plain, cost = self._costs.of(0), self._costs.of(depth)
        assert plain and cost  # it began with plain steps
        return cost / plain

    def _best(self, seen: Acceptance, depths: list[int]) -> int:
        return max((0, *depths), key=lambda depth: seen.tokens(depth) / self._cost(depth))

    def _informative(self, depths: list[int]) -> int:
        """The depth that would pay most if all drafts stayed."""
        return max(depths, key=lambda depth: (1 + depth) / self._cost(depth), default=0)
