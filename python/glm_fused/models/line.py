"""The ranks that stand in a line, and what goes along it: rows to the last one, and back.

On the way to the last rank each has its layers work on the rows. What the last makes of them goes
back by the same way, so each rank talks to its neighbours alone, and both ways are open at once: a
rank may be at the rows of one text while those of another are on their way back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

_DTYPES = (mx.bfloat16, mx.float16, mx.float32)


@dataclass(eq=False)
class Place:
    """A rank's place among all that stand in a line.

    Attributes:
        rank: its number; 0 has the first layers.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether rows begin here."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether rows end here."""
        return self.rank == self.size - 1


class Line(Place):
    """This process among those of a group; all have to make the same calls, in the same order.

    One thread at a time makes them.

    Attributes:
        group: that they are the processes of.
    """

    def __init__(self, group: mx.distributed.Group):
        super().__init__(group.rank(), group.size())
        self.group = group
        # What comes back is awaited beside a rank's layers, not before those that are next.
        self._back = mx.new_thread_unsafe_stream(mx.cpu)
        self._asked = deque[mx.array]()  # what is to come back and was not begun

    def take(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """What the rank before hands on; not evaluated yet, as all of these."""
        return mx.distributed.recv(shape, dtype, self.rank - 1, group=self.group)

    def hand_on(self, x: mx.array) -> mx.array:
        """``x``, which the rank after this one has once it is evaluated."""
        return mx.distributed.send(x, self.rank + 1, group=self.group)

    def take_back(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """What the rank after this one hands back."""
        source = self.rank + 1
        return mx.distributed.recv(shape, dtype, source, group=self.group, stream=self._back)

    def hand_back(self, x: mx.array) -> mx.array:
        """``x``, which the rank before this one has once it is evaluated."""
        return mx.distributed.send(x, self.rank - 1, group=self.group, stream=self._back)

    def around(self, x: mx.array, dtype: mx.Dtype, is_awaited: bool) -> mx.array:
        """What the last rank has made, in ``dtype``, of the rows ``x`` that this one made.

        The way there begins at once, and the way back, too, if it ``is_awaited``: what follows
        must not hold them up. Otherwise nothing goes back unless all ranks ask for the result or
        evaluate it, as nobody does for most of a prompt without drafts.
        """
        if self.is_last:
            mx.async_eval(x)
            found = x
        else:
            mx.async_eval(self.hand_on(x))
            found = self.take_back(x.shape, dtype)
        if not self.is_first:
            found = self.hand_back(found)
        if is_awaited:
            self.ask_for(found, at_once=True)
        return found

    def ask_for(self, found: mx.array, at_once: bool) -> None:
        """Have what `around` gave come back, after all that was asked for before.

        That begins ``at_once``, or when as many more are asked for as there are ranks after this
        one: then the last one is done with it, and nobody has to wait.
        """
        self._asked.append(found)
        most = 0 if at_once else self.size - 1 - self.rank
        while len(self._asked) > most:
            mx.async_eval(self._asked.popleft())

    def from_first(self, x: mx.array) -> mx.array:
        """What the first rank has where this one has ``x``, of the same shape and type.

        It is on its way at once, before rows that `around` is given later.
        """
        found = x if self.is_first else self.take(x.shape, x.dtype)
        if not self.is_last:
            found = self.hand_on(found)
        mx.async_eval(found)
        return found

    def wait(self) -> None:
        """Wait for what is on its way back."""
        mx.synchronize(self._back)

    def finish(self) -> None:
        """Wait for all that comes back, some of which nobody may use.

        Ranks that have ended have to, before they tell each other anything else.
        """
        while self._asked:
            mx.async_eval(self._asked.popleft())
        self.wait()

    def least(self, number: int) -> int:
        """The least of all ranks' numbers; each has to call it."""
        numbers = mx.array(number, mx.int32)
        return cast(int, mx.distributed.all_min(numbers, group=self.group, stream=mx.cpu).item())

    def agree_on_dtypes(
        self, given: mx.Dtype | None, made: Callable[[mx.Dtype], mx.Dtype]
    ) -> tuple[mx.Dtype, mx.Dtype]:
        """The types of the rows that this rank takes, and of those that come back.

        Args:
            given: of the rows that begin here; None on other ranks than the first.
            made: gives the type of what this rank makes of rows of a type.
        """
        taken = _named(self.take((1,), mx.int32)) if given is None else given
        mine = made(taken)
        if self.is_last:
            returned = mine
        else:
            mx.eval(self.hand_on(mx.array([_DTYPES.index(mine)], mx.int32)))
            returned = _named(self.take_back((1,), mx.int32))
        if not self.is_first:
            mx.eval(self.hand_back(mx.array([_DTYPES.index(returned)], mx.int32)))
        return taken, returned


def _named(code: mx.array) -> mx.Dtype:
    """The type that another rank has named."""
    return _DTYPES[cast(int, code.item())]
