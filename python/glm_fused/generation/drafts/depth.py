"""Which tokens to draft: so many, or what pays by the costs and acceptance so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from ..limits import AUTO, MOST_DRAFTS
from .drafter import Kind, course
from .experience import USUAL_ACCEPTANCE, Average, Experience, Purse

# That `AUTO` chooses among: each is a step of its own to record, and with the known token these
# are numbers of tokens that kernels take together.
DEPTHS = (1, 2, 3, 5, 7)
BURST = 6  # plain steps in a row that are measured first
AGAIN, BETWEEN = 3, 256  # and how many later, after so many tokens
_BESIDE = 4  # steps with drafts after a plain one that are measured against it
_OTHERS, _CLOSE = 32, 0.8  # steps after which two are of another length, if that is about as good
_SURE = 4  # tokens of which what is known of other texts is worth as much
_FIRST, _SHARE = 2.0, 0.01  # of the text's time that may be spent, in plain steps and of those
_GAIN = 1.03  # from which on drafts are made


class Plan(NamedTuple):
    """Drafts to make: of which kind, and how many tokens."""

    kind: Kind
    depth: int


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
        self._rates: dict[Kind, Average] = {}
        # Gains and numbers of drafts, with the most there may be, until more is known.
        self._bests: dict[tuple[Kind, int], tuple[float, int]] = {}
        self._experience = experience or Experience()
        # A fixed number makes the same steps of every text, so that a seed draws the same tokens.
        unknown = self._auto and self._experience.plain is None
        self._plain, self._since = BURST if unknown else AGAIN, 0
        self._beside = self._rounds = 0
        self._purse, self._trial = Purse(_FIRST, _SHARE), False
        # Plain steps until drafts of these kinds can be afforded at the earliest.
        self._rest, self._resting = 0, list[Kind]()

    @property
    def plain_seconds(self) -> float | None:
        """What a plain step costs; None where there was none like others."""
        return self._experience.plain

    def next(
        self, kinds: Sequence[Kind], most: int, lacking: Callable[[Kind], int] = lambda kind: 0
    ) -> Plan | None:
        """Which drafts to make, up to ``most`` of one of these kinds; None for a plain step.

        ``lacking`` says how many rows what makes them has to catch up with before.
        """
        if not kinds or not self._depths or most < 1 or self._plain:
            return None
        if not self._auto:
            depth = min(self._depths[0], most)
            return Plan(max(kinds, key=lambda kind: self._tokens(kind)[depth]), depth)
        if self._rest and kinds == self._resting:
            return None
        (gain, depth), kind = max((self._best(kind, most), kind) for kind in kinds)
        self._trial = gain <= _GAIN
        if not self._trial:
            return Plan(kind, self._maybe_another(kind, depth, most))
        if not depth:
            return None
        if (lack := self._cost(self._loss(kind, depth), lacking(kind)) - self._spare) > 0:
            self._rest, self._resting = int(lack / _SHARE), list(kinds)
            return None
        return Plan(kind, depth)

    @property
    def rest(self) -> int:
        """How many plain steps need no thought after one, as no draft can be afforded before."""
        return 0 if self._plain else self._rest

    def count_plain(self, seconds: float | None, steps: int = 1) -> None:
        """A plain step took so long, the last of some; None where it was not like others."""
        experience = self._experience
        experience.purse.fill(steps)
        self._purse.fill(steps)
        self._since += steps
        self._rest = max(self._rest - steps, 0)
        if seconds is not None:
            experience.add_plain(seconds)
            self._plain, self._since, self._beside = max(self._plain - 1, 0), 0, _BESIDE

    def count(self, plan: Plan, kept: int, seconds: float) -> None:
        """A step with such drafts, of which it kept some, took so long."""
        kind, depth = plan
        plain, costs = self._experience.plain, self._experience.costs(kind.source)
        for place, each in enumerate(course(kind)[: min(kept + 1, depth)]):
            self._add(each, place < kept)
        self._rounds += 1
        self._since += 1 + kept
        if not self._auto or plain is None:
            return
        if self._trial:  # what interrupts a step is no loss of drafts'
            self._spend(min(seconds / plain, 2 * costs.table[depth]) - (1 + kept))
        if self._beside:
            self._beside -= 1
            costs.add(depth, seconds / plain)
            self._forget(kind.source)
        elif not costs.knows(depth):
            self._plain = AGAIN
        if self._since >= BETWEEN:
            self._plain = AGAIN

    def count_unmade(self, kind: Kind, stayed: bool) -> None:
        """The first token of such a draft, which was not made, would have stayed or not."""
        self._add(kind, stayed)

    def count_rows(self, rows: int, seconds: float) -> None:
        """It took so long to catch up with so many rows."""
        if (plain := self._experience.plain) is not None:
            self._experience.row_cost.add(seconds / plain / rows)
            self._rest = 0
            self._spend(seconds / plain * self._trial)

    def reviews(self, kind: Kind, rows: int) -> bool:
        """Whether to find out now, with so many rows, how many tokens would have been guessed."""
        if not self._auto or self._plain or self._cost(0.0, rows) > self._spare:
            return False
        table = self._experience.costs(kind.source).table
        return any(1 + depth > _GAIN * table[depth] for depth in self._depths)

    def _cost(self, loss: float, rows: int) -> float:
        """What it costs to lose so much, and to catch up with so many rows."""
        return loss + rows * self._experience.row_cost.value

    @property
    def _spare(self) -> float:
        """What may be spent."""
        return min(self._purse.spare, self._experience.purse.spare)

    def _spend(self, cost: float) -> None:
        for purse in (self._purse, self._experience.purse):
            purse.spend(max(cost, 0.0))

    def _add(self, kind: Kind, stayed: bool) -> None:
        self._rate(kind).add(stayed)
        self._experience.add(kind, stayed)
        self._forget(kind.source)

    def _forget(self, source: str) -> None:
        """What is best has to be found out anew."""
        self._bests = {key: best for key, best in self._bests.items() if key[0].source != source}
        self._rest = 0

    def _rate(self, kind: Kind) -> Average:
        rate = self._rates.get(kind)
        if rate is None:
            usual = self._experience.rate(kind) if self._auto else USUAL_ACCEPTANCE
            rate = self._rates[kind] = Average(1 / 32, usual, _SURE)
        return rate

    def _tokens(self, kind: Kind) -> list[float]:
        """How many tokens a step with each number of drafts is expected to give."""
        rates = [self._rate(each).value for each in course(kind)[: self._depths[-1]]]
        return list(accumulate(accumulate(rates, mul), initial=1.0))

    def _best(self, kind: Kind, most: int) -> tuple[float, int]:
        """How many times as fast as plain steps those with the best number are, and the number."""
        key = kind, min(most, MOST_DRAFTS)
        best = self._bests.get(key)
        if best is None:
            best = self._bests[key] = max(self._gains(kind, most), default=(0.0, 0))
        return best

    def _gains(self, kind: Kind, most: int) -> list[tuple[float, int]]:
        tokens, table = self._tokens(kind), self._experience.costs(kind.source).table
        return [(tokens[d] / table[d], d) for d in self._depths if d <= most]

    def _loss(self, kind: Kind, depth: int) -> float:
        """How much longer a step is expected to take than plain ones, in such."""
        return self._experience.costs(kind.source).table[depth] - self._tokens(kind)[depth]

    def _maybe_another(self, kind: Kind, depth: int, most: int) -> int:
        """The best number of drafts, or now and then another, whose cost may have changed."""
        turn, again = divmod(self._rounds, _OTHERS)
        if again < _OTHERS - 2:
            return depth
        gains = self._gains(kind, most)
        least = _CLOSE * max(gains)[0]
        others = [d for gain, d in gains if d != depth and gain > least]
        return others[turn % len(others)] if others else depth
