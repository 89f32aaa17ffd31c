"""What is known of steps with drafts: what they cost, and how many drafts stay."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import median

import mlx.nn as nn

from ..limits import MOST_DRAFTS
from .drafter import Kind

_PLAIN = 7  # plain steps of which the median is what one costs
_FEW, _SAMPLES = 3, 7  # samples of a cost with which it is known, and of which the median is it
USUAL_ACCEPTANCE = 0.7  # a draft's, until something is known of it
_USUAL_COST = 0.3  # and in plain steps what it costs
_HOPE = 0.9  # of what steps of other lengths suggest, so that a length that may pay is tried
_DEEPER = 0.6  # of a draft's cost, that each costs in a longer step
_ROW_COST = 0.05  # what a row costs that a layer lacks, in plain steps, until it is measured
_FIRST, _SHARE = 4.0, 0.005  # plain steps' time that may be spent, and of that of all


class Average:
    """An average of samples, in which the latest weigh the most.

    A new one has at least ``weight``, and as much as each of those before while they are few:
    ``value``, which is there at first, stands for so many.
    """

    def __init__(self, weight: float, value: float, count: int):
        self.value, self._weight, self._count = value, weight, count

    def add(self, sample: float) -> None:
        """Count a sample."""
        self._count += 1
        self.value += max(self._weight, 1 / self._count) * (sample - self.value)


class Cost:
    """What a step costs: the median of the last samples, as it is of plain steps.

    Lower ones would make drafts look good where all steps are interrupted now and then. The first
    is left out: it prepares the others.
    """

    def __init__(self) -> None:
        self._samples, self._prepared = deque[float](maxlen=_SAMPLES), False

    def add(self, sample: float) -> None:
        """Count a sample."""
        if self._prepared:
            self._samples.append(sample)
        self._prepared = True

    @property
    def known(self) -> bool:
        """Whether there are a few samples."""
        return len(self._samples) >= _FEW

    def value(self, expected: float) -> float:
        """The cost; where it is not known yet what is ``expected``, or less if a sample was."""
        if not self.known:
            return min([expected, *self._samples])
        return median(self._samples)


class Costs:
    """What the steps with drafts of one source cost, in plain steps, drafting included."""

    def __init__(self) -> None:
        self._costs = {depth: Cost() for depth in range(1, MOST_DRAFTS + 1)}
        self.table = self._table()

    def add(self, depth: int, cost: float) -> None:
        """Count a step with so many drafts."""
        self._costs[depth].add(cost)
        self.table = self._table()

    def knows(self, depth: int) -> bool:
        """Whether there were a few steps with so many drafts."""
        return self._costs[depth].known

    def _table(self) -> list[float]:
        """The cost for each number of drafts; ``table[0]`` is that of a plain step."""
        known = [(0, 1.0)] + [(d, cost.value(0.0)) for d, cost in self._costs.items() if cost.known]
        expected = [1.0] * (MOST_DRAFTS + 1)
        for (low, below), (high, above) in pairwise(known):
            for depth in range(low, high + 1):
                share = (depth - low) / (high - low)
                expected[depth] = _HOPE * (below + share * (above - below))
        deepest, most = known[-1]
        draft = _DEEPER * (most - 1) / deepest if deepest else _USUAL_COST
        for depth in range(deepest + 1, MOST_DRAFTS + 1):
            expected[depth] = 1 + draft * depth
        # More tokens cannot take less than one, whatever was measured.
        costs = (cost.value(expected[depth]) for depth, cost in self._costs.items())
        return [1.0, *(max(1.0, cost) for cost in costs)]


class Purse:
    """Time, in plain steps, that may be spent on finding out whether drafts pay now.

    It is what there is at first and a share of the time of plain steps, so that little is spent
    however long drafts do not pay.
    """

    def __init__(self, first: float, share: float):
        self._first, self._share, self.spare = first, share, first

    def fill(self, steps: int) -> None:
        """There were so many plain steps."""
        self.spare = min(self.spare + steps * self._share, 10 * self._first)

    def spend(self, cost: float) -> None:
        """So much was spent."""
        self.spare = max(self.spare - cost, -self._first)


class Experience:
    """What steps with so many drafts cost, and how many drafts stay, in one text after the other.

    Costs are the model's and the machine's. How many drafts of a kind stay is the text's, but
    others' are what to expect of a new one.

    Attributes:
        purse: what may be spent in all texts on drafts that are expected not to pay.
        row_cost: what a row costs, in plain steps, that what makes drafts has to catch up with.
    """

    def __init__(self) -> None:
        self._plain = deque[float](maxlen=_PLAIN)
        self._costs: dict[str, Costs] = {}
        self._rates: dict[Kind, Average] = {}
        self.purse, self.row_cost = Purse(_FIRST, _SHARE), Average(0.3, _ROW_COST, 1)

    @property
    def plain(self) -> float | None:
        """The seconds of a plain step; None where there was none."""
        return median(self._plain) if self._plain else None

    def add_plain(self, seconds: float) -> None:
        """Count a plain step."""
        self._plain.append(seconds)

    def costs(self, source: str) -> Costs:
        """What steps with drafts of a source cost."""
        costs = self._costs.get(source)
        if costs is None:
            costs = self._costs[source] = Costs()
        return costs

    def rate(self, kind: Kind) -> float:
        """How often the next token of a kind of draft stays."""
        rate = self._rates.get(kind)
        return USUAL_ACCEPTANCE if rate is None else rate.value

    def add(self, kind: Kind, stayed: bool) -> None:
        """Count a token of a kind of draft."""
        rate = self._rates.get(kind)
        if rate is None:
            rate = self._rates[kind] = Average(1 / 256, USUAL_ACCEPTANCE, 4)
        rate.add(stayed)


def experience_of(model: nn.Module) -> Experience:
    """What there is of a model's steps and drafts, which it keeps."""
    kept: Experience = model.__dict__.setdefault("_draft_experience", Experience())
    return kept
