"""Which tokens to draft: so many, or what pays by the costs and acceptance so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import mlx.nn as nn

from ..limits import AUTO, MOST_DRAFTS
from .drafter import Kind

# That `AUTO` chooses among: each is a step of its own to record, and with the known token these
# are numbers of tokens that kernels take together.
DEPTHS = (1, 2, 3, 5, 7)
BURST = 6  # plain steps in a row that are measured first
AGAIN, BETWEEN = 3, 256  # and how many later, after so many tokens
_EXPLORE = 16  # drafts of a kind after which two are a little deeper
_FEW = 4  # samples of a cost
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


class Cost:
    """What a kind of step costs: of few samples the least, since what interrupts them adds to it.

    Of many it is an average, so that it follows what changes.
    """

    def __init__(self, sample: float):
        self._average, self.count = Average(0.2, sample), 1

    @property
    def value(self) -> float:
        return self._average.value

    def add(self, sample: float) -> None:
        self.count += 1
        if self.count > _FEW:
            self._average.add(min(sample, 2 * self.value))
        elif sample < self.value:
            self._average = Average(0.2, sample)


class Experience:
    """What steps with so many drafts cost, and how many drafts stay, in one text after the other.

    Costs are multiples of plain steps, drafting included; they are the model's and the machine's.
    Each source of drafts has costs of its own. How many drafts of a kind stay is the text's, but
    others' are what to expect of a new one.
    """

    def __init__(self) -> None:
        self.plain: Average | None = None  # seconds
        self._ratios: dict[str, dict[int, Cost]] = {}
        self._rates: dict[Kind, Average] = {}

    def rate(self, kind: Kind) -> float:
        """How often a draft of a kind stays."""
        rate = self._rates.get(kind)
        return _USUAL_ACCEPTANCE if rate is None else rate.value

    def add_drafts(self, kind: Kind, depth: int, kept: int) -> None:
        """Count ``depth`` drafts, of which some were kept."""
        rate = self._rates.setdefault(kind, Average(1 / 256, _USUAL_ACCEPTANCE))
        for i in range(min(kept + 1, depth)):
            rate.add(float(i < kept))

    def add_plain(self, seconds: float) -> None:
        """Count a plain step; what interrupts it counts as twice the average at most."""
        if self.plain is None:
            self.plain = Average(0.2, seconds)
        else:
            self.plain.add(min(seconds, 2 * self.plain.value))

    def add(self, source: str, depth: int, seconds: float) -> None:
        """Count a step with drafts, after a plain one."""
        assert self.plain is not None
        ratio, ratios = seconds / self.plain.value, self._ratios.setdefault(source, {})
        if depth in ratios:
            ratios[depth].add(ratio)
        else:
            ratios[depth] = Cost(ratio)

    def knows(self, source: str, depth: int) -> bool:
        """Whether there were a few of such steps."""
        cost = self._ratios.get(source, {}).get(depth)
        return cost is not None and cost.count >= _FEW

    def of(self, source: str, depth: int) -> float:
        """What a step costs: as was seen, or on a line between what was.

        Beyond that it is what is usual, so that it is tried: deeper steps cost less a token.
        """
        ratios = self._ratios.get(source, {})
        known = {0: 1.0} | {d: cost.value for d, cost in ratios.items()}
        if depth in known:
            return known[depth]
        below = max(d for d in known if d < depth)
        above = min((d for d in known if d > depth), default=None)
        if above is None:
            return max(known[below], 1 + _USUAL_COST * depth)
        slope = (known[above] - known[below]) / (above - below)
        return known[below] + slope * (depth - below)


class Acceptance:
    """How often each draft of one kind stays where those before it do, at first ``usual``."""

    def __init__(self, usual: float) -> None:
        self._rates = [Average(1 / 32, usual) for _ in range(MOST_DRAFTS)]
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
        experience: that of the texts before.
    """

    def __init__(
        self, wanted: int | str, most: int = MOST_DRAFTS, experience: Experience | None = None
    ) -> None:
        self._auto = wanted == AUTO
        self._depths = [d for d in DEPTHS if d <= most] if self._auto else [min(int(wanted), most)]
        self._kinds: dict[Kind, Acceptance] = {}
        self._bests: dict[Kind, tuple[float, int]] = {}  # gains and numbers, until the next draft
        self._experience = experience or Experience()
        # A fixed number makes the same steps of every text, so that a seed draws the same tokens.
        unknown = self._auto and self._experience.plain is None
        self._plain, self._since = BURST if unknown else AGAIN, 0
        self._wait = _WAIT
        self._last: tuple[str, int] | None = None  # the step before, if it had drafts
        self._whole = False  # all of which stayed

    @property
    def plain_seconds(self) -> float | None:
        """What a plain step costs; None where there was none like others."""
        return None if self._experience.plain is None else self._experience.plain.value

    def next(self, kinds: Sequence[Kind], most: int) -> Plan | None:
        """Which drafts to make, up to ``most`` of one of these kinds; None for a plain step."""
        if not kinds or most < 1 or self._plain:
            return None
        if not self._auto:
            depth = min(self._depths[0], most)
            return Plan(max(kinds, key=lambda kind: self._seen(kind).tokens(depth)), depth)
        (gain, depth), kind = max((self._best(kind, most), kind) for kind in kinds)
        if gain <= 1:  # most steps of a text that does not suit
            return self._to_find_out(kinds, most)
        explore = self._seen(kind).rounds % _EXPLORE >= _EXPLORE - 2
        deeper = [each for each in self._depths if depth < each <= most]
        return Plan(kind, deeper[0] if explore and deeper else depth)

    def count_plain(self, seconds: float | None) -> None:
        """A plain step took so long; None where it was not like others."""
        self._last = None
        if seconds is not None:
            self._experience.add_plain(seconds)
            self._plain, self._since = max(self._plain - 1, 0), 0
        self._pass(1)

    def count(self, plan: Plan, kept: int, seconds: float, before: float = 0.0) -> None:
        """A step with such drafts, of which it kept some, took so long.

        ``before`` it, what former plain steps had left to do took seconds besides.
        """
        (kind, depth), seen = plan, self._seen(plan.kind)
        # The first of several prepares the others.
        if self._last == (kind.source, depth):
            self._experience.add(kind.source, depth, seconds)
        self._last, self._whole = (kind.source, depth), kept == depth
        self._bests.clear()
        self._pass(1 + kept)
        seen.add(depth, kept)
        self._experience.add_drafts(kind, depth, kept)
        if not self._auto:
            return
        plain = self.plain_seconds or seconds or 1.0
        cost = self._experience.of(kind.source, depth)
        pays = kept == depth and 1 + depth > cost
        if pays or self._best(kind, MOST_DRAFTS)[0] > 1:
            self._wait = 0
        else:
            # A first one is recorded, too, which is once.
            took = min(seconds / plain, 1.25 * (1 + depth))
            cost = max(cost, took) + before / plain
            self._wait = max(_WAIT, int((cost - seen.tokens(depth)) / _LOSS))
        if self._since >= BETWEEN:
            self._plain = AGAIN

    def _pass(self, tokens: int) -> None:
        self._since += tokens
        self._wait -= tokens

    def _seen(self, kind: Kind) -> Acceptance:
        seen = self._kinds.get(kind)
        if seen is None:
            usual = self._experience.rate(kind) if self._auto else _USUAL_ACCEPTANCE
            seen = self._kinds[kind] = Acceptance(usual)
        return seen

    def _best(self, kind: Kind, most: int) -> tuple[float, int]:
        """How many times as fast as plain steps those with the best number are, and the number."""
        best = self._bests.get(kind)
        if best is None or best[1] > most:
            depths = [depth for depth in self._depths if depth <= most]
            best = max(((self._gain(kind, depth), depth) for depth in depths), default=(0.0, 0))
            self._bests[kind] = best
        return best

    def _gain(self, kind: Kind, depth: int) -> float:
        return self._seen(kind).tokens(depth) / self._experience.of(kind.source, depth)

    def _to_find_out(self, kinds: Sequence[Kind], most: int) -> Plan | None:
        """Drafts that may not pay: after the wait, and one more of those that tell what they cost.

        Those would pay most if all stayed, and are of the kind of which least is known.
        """
        if self._last is not None and self._whole and not self._experience.knows(*self._last):
            source, depth = self._last
            again = [kind for kind in kinds if kind.source == source]
            if again and depth <= most:
                return Plan(again[0], depth)
        depths = [depth for depth in self._depths if depth <= most]
        if self._wait > 0 or not depths:
            return None
        kind = min(kinds, key=lambda kind: self._seen(kind).rounds)
        cost = self._experience.of
        return Plan(kind, max(depths, key=lambda d: (1 + d) / cost(kind.source, d)))


def experience_of(model: nn.Module) -> Experience:
    """What there is of a model's steps and drafts, which it keeps."""
    kept: Experience = model.__dict__.setdefault("_draft_experience", Experience())
    return kept
