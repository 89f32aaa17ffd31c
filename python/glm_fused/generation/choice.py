"""Chooses tokens from logits: one after the other, or among drafts, with the same outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .drafts.drafter import Draft
from .options import Options


class Verdict(NamedTuple):
    """What became of a draft of d tokens, not evaluated yet.

    ``accepted`` [d] says of each draft whether it stays if those before it do; ``tokens`` [d + 1],
    uint32, are what comes in place of the first that does not, or after the last.
    """

    accepted: mx.array
    tokens: mx.array


class Choice:
    """How tokens are chosen: greedily or sampled, after processors that see the tokens before.

    Args:
        options: how to sample.
        vocabulary: how many tokens there are.
        known: the tokens of the text so far, which the caller extends.
    """

    def __init__(self, options: Options, vocabulary: int, known: Sequence[int]):
        self._greedy, self._known = options.greedy, known
        self._shape = options.shaper(vocabulary)
        self._processors = options.processors()
        self._window = options.repetition_context_size

    def next(self, logits: mx.array, ahead: Sequence[mx.array] = ()) -> mx.array:
        """The token, uint32 [1], after all known ones and those ``ahead`` of them, each [1]."""
        logits = self._processed(logits, ahead)
        if self._greedy:
            return _likeliest(logits)
        return mx.random.categorical(self._shape(_normalized(logits)))

    def draw(self, logits: mx.array, ahead: Sequence[mx.array]) -> tuple[mx.array, mx.array | None]:
        """A draft, uint32 [1], and the probabilities [1, vocabulary] it was drawn with.

        It is drawn as `next` would draw from such ``logits`` [1, vocabulary]; without
        probabilities where it is the likeliest.
        """
        logits = self._processed(logits, ahead)
        if self._greedy:
            return _likeliest(logits), None
        shaped = self._shape(_normalized(logits)).astype(mx.float32)
        return mx.random.categorical(shaped), mx.softmax(shaped, axis=-1)

    def judge(self, logits: mx.array, draft: Draft) -> Verdict:
        """Which of a draft's tokens stay, given the ``logits`` [d + 1, vocabulary].

        Row i has the logits after the known tokens and i of the draft. The tokens that come out
        are those, or have the distribution of those, that `next` gives one after the other.
        """
        if self._processors:
            drafted = [draft.tokens[i : i + 1] for i in range(len(logits) - 1)]
            rows = [self._processed(logits[i : i + 1], drafted[:i]) for i in range(len(logits))]
            logits = mx.concatenate(rows)
        if self._greedy:
            tokens = _likeliest(logits)
            return Verdict(tokens[:-1] == draft.tokens, tokens)
        shaped = self._shape(_normalized(logits)).astype(mx.float32)
        return judge_sampled(mx.softmax(shaped, axis=-1), draft)

    def _processed(self, logits: mx.array, ahead: Sequence[mx.array]) -> mx.array:
        if not self._processors:
            return logits
        known = mx.array(list(self._known[-self._window :]), mx.uint32)
        tokens = mx.concatenate([known, *ahead])
        for processor in self._processors:
            logits = processor(tokens, logits)
        return logits


def judge_sampled(probs: mx.array, draft: Draft) -> Verdict:
    """Accept drafts so that what comes out has the distribution ``probs`` [..., d + 1, vocabulary].

    A draft x that was drawn with probability q(x) stays with probability min(1, p(x) / q(x)); in
    its place comes a token drawn from max(0, p - q), and after the last one from p. Where nothing
    was drawn, q is 1 at x. Leading dimensions are draws of their own.
    """
    at = draft.tokens[..., None]
    p = probs[..., :-1, :]
    wanted = mx.take_along_axis(p, at, axis=-1)
    if draft.probs is None:
        given = mx.ones_like(wanted)
        rest = mx.put_along_axis(p, at, mx.zeros_like(wanted), axis=-1)
    else:
        given = mx.take_along_axis(draft.probs, at, axis=-1)
        rest = mx.maximum(p - draft.probs, 0)
    accepted = (mx.random.uniform(shape=wanted.shape) * given < wanted)[..., 0]
    # Where p equals q but for rounding, nothing is left; then a rejection is a matter of rounding.
    rest = mx.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
    others = mx.concatenate([rest, probs[..., -1:, :]], axis=-2)
    return Verdict(accepted, mx.random.categorical(mx.log(others)))


def _likeliest(logits: mx.array) -> mx.array:
    """The tokens, uint32 [l], with the highest of logits [l, vocabulary], the first of equals."""
    return mx.argmax(logits, axis=-1)


def _normalized(logits: mx.array) -> mx.array:
    """Log-probabilities [l, vocabulary], as mlx-lm's samplers take them."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
