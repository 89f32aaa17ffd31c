"""Chooses tokens from logits: one after the other, or beside drafts, with the same outcome."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import mlx.core as mx

from .options import Options


class Keys:
    """The random key of each token of a text, which depends on the seed and its place alone.

    They are those of MLX's generator, which a seed begins and each draw advances. None draws a
    seed.
    """

    def __init__(self, seed: int | None):
        self._state = mx.random.key(secrets.randbits(64) if seed is None else seed)
        self._keys: list[mx.array] = []  # of the places from `_first` on
        self._first = 0

    def at(self, place: int) -> mx.array:
        """The key of the token after so many generated ones."""
        while len(self._keys) <= place - self._first:
            self._state, key = mx.random.split(self._state)
            self._keys.append(key)
        return self._keys[place - self._first]

    def forget(self, place: int) -> None:
        """Let go of the keys of all tokens before this place."""
        del self._keys[: place - self._first]
        self._first = max(place, self._first)


class Choice:
    """How tokens are chosen: greedily or sampled, after processors that see the tokens before.

    A token is drawn with the key of its place in the text, whether there are drafts or not. So a
    draft stays where it is the token that would be drawn anyway, and drafts that are drawn with the
    same keys from similar logits mostly are.

    Args:
        options: how to sample, and the seed.
        vocabulary: how many tokens there are.
        known: the tokens of the text so far, which the caller extends.
    """

    def __init__(self, options: Options, vocabulary: int, known: Sequence[int]):
        self._greedy, self._known, self._prompt = options.greedy, known, len(known)
        self._shape = options.shaper(vocabulary)
        self._processors = options.processors()
        self._window = options.repetition_context_size
        self._keys = Keys(options.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token is always the likeliest of the logits as they are."""
        return self._greedy and not self._processors

    def next(self, logits: mx.array, ahead: Sequence[mx.array] = ()) -> mx.array:
        """The token, uint32 [1], of logits [1, vocabulary].

        It follows all known ones and those ``ahead`` of them, of which each array has some.
        """
        logits = self._processed(logits, ahead)
        if self._greedy:
            return mx.argmax(logits, axis=-1)
        place = len(self._known) - self._prompt
        self._keys.forget(place)
        key = self._keys.at(place + sum(tokens.size for tokens in ahead))
        return mx.random.categorical(self._shape(_normalized(logits)), key=key)

    def judge(self, logits: mx.array, draft: mx.array) -> mx.array:
        """What `next` gives beside each token of a draft, and after the last: uint32 [d + 1].

        Row i of ``logits`` [d + 1, vocabulary] comes after the known tokens and i of the ``draft``,
        uint32 [d]. Tokens of the draft stay up to the first that differs from what is given here,
        which takes its place.
        """
        if self.takes_likeliest:
            return mx.argmax(logits, axis=-1)
        # Each row alone, as `next` has it: the bits of a row may depend on the shape.
        drafted = [draft[i : i + 1] for i in range(len(logits) - 1)]
        return mx.concatenate(
            [self.next(logits[i : i + 1], drafted[:i]) for i in range(len(logits))]
        )

    def _processed(self, logits: mx.array, ahead: Sequence[mx.array]) -> mx.array:
        if not self._processors:
            return logits
        known = mx.array(list(self._known[-self._window :]), mx.uint32)
        tokens = mx.concatenate([known, *ahead])
        for processor in self._processors:
            logits = processor(tokens, logits)
        return logits


def kept(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens of a draft stay, beside what `Choice.judge` gave."""
    for i, (drafted, right) in enumerate(zip(draft, chosen, strict=False)):
        if drafted != right:
            return i
    return len(draft)


def _normalized(logits: mx.array) -> mx.array:
    """Log-probabilities [l, vocabulary], as mlx-lm's samplers take them."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
