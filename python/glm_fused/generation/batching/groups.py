"""Prompts that have not begun, and which of them are taken together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from .filling import Prompt
from .rows import Row

PATIENCE = 0.02  # seconds that prompts wait for others that are on their way


class Unbegun:
    """Prompts that have not begun, the oldest first.

    They are for so many ``batches``, each of which is to get about as many of them as another.
    """

    def __init__(self, batches: int) -> None:
        self.prompts: list[Prompt] = []
        self._batches = batches
        self._since = 0.0

    def add(self, prompt: Prompt) -> None:
        """One more; the wait for others begins with the first."""
        if not self.prompts:
            self._since = time.perf_counter()
        self.prompts.append(prompt)

    def remove(self, row: Row) -> None:
        """This text's is not to be taken any more."""
        self.prompts = [prompt for prompt in self.prompts if prompt.row is not row]

    def clear(self) -> None:
        """None is to be taken any more."""
        self.prompts = []

    @property
    def nbytes(self) -> int:
        """The bytes of their caches."""
        return sum(layer.nbytes for prompt in self.prompts for layer in prompt.cache)

    def patience(self) -> float:
        """How many seconds they still wait for others, where some are on their way."""
        return max(0.0, self._since + PATIENCE - time.perf_counter()) if self.prompts else 0.0

    def groups(self, most: Callable[[Prompt], int]) -> Iterator[list[Prompt]]:
        """Those that are taken together, until none is left; of no more tokens than ``most`` says
        of the first."""
        texts = -(-len(self.prompts) // self._batches)
        while self.prompts:
            found = group(self.prompts, most(self.prompts[0]))[:texts]
            self.prompts = [prompt for prompt in self.prompts if prompt not in found]
            yield found


def group(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """The first of some prompts, and those that are taken together with it.

    They are padded to the one with the most tokens left. So together are those with similarly many,
    with up to a fifth of padding, and no more than ``most`` tokens: several that are longer than a
    chunk by themselves gain nothing, and each would wait for the others.
    """
    found, total, longest = [prompts[0]], prompts[0].left, prompts[0].left
    for prompt in prompts[1:]:
        size, length = total + prompt.left, max(longest, prompt.left)
        padded = length * (len(found) + 1)
        if padded <= most and 4 * padded <= 5 * size:
            found.append(prompt)
            total, longest = size, length
    return found
