"""Sampling with drafts has the distribution of sampling without them, whatever drew the drafts."""

import mlx.core as mx
import numpy as np
import pytest

from glm_fused.generation import choice as module
from glm_fused.generation.choice import Choice, judge_sampled
from glm_fused.generation.drafts.drafter import Draft
from glm_fused.generation.options import Options

DRAWS, DEPTH, VOCABULARY = 100_000, 2, 6
LIKELY, UNLIKELY = 4.0, 8.0  # standard deviations; the seeds are fixed


def tables(seed):
    """A model of VOCABULARY tokens: the probabilities after none, one and two tokens."""
    rng = np.random.default_rng(seed)
    return [
        rng.dirichlet(np.full(VOCABULARY, 0.6), VOCABULARY**n).astype(np.float32)
        for n in range(DEPTH + 1)
    ]


def draw(probs, rng):
    """A token of each row of probabilities."""
    sums = probs.cumsum(-1)
    return (rng.random((len(probs), 1)) * sums[:, -1:] > sums).sum(-1)


def drafts(kind, guesses, rng):
    """DRAWS drafts [DRAWS, DEPTH], and the probabilities each was drawn from."""
    if kind == "lookup":  # the same tokens every time
        return np.tile([1, 4], (DRAWS, 1)), None
    first = np.repeat(guesses[0], DRAWS, 0)
    x = draw(first, rng)
    second = guesses[1][x]
    return np.stack([x, draw(second, rng)], 1), np.stack([first, second], 1)


def outcomes(kind, judge, seed):
    """How often each text of DEPTH + 1 tokens comes out of a step, and its probability.

    A step gives what is kept of a draft and one token more; the model itself draws what is missing.
    """
    rng, model, guesses = np.random.default_rng(seed), tables(seed), tables(seed + 100)
    mx.random.seed(seed)
    tokens, probs = drafts(kind, guesses, rng)
    after = tokens[:, 0] * VOCABULARY + tokens[:, 1]
    rows = np.stack([np.repeat(model[0], DRAWS, 0), model[1][tokens[:, 0]], model[2][after]], 1)
    draft = Draft(mx.array(tokens), None if probs is None else mx.array(probs))
    accepted, others = map(np.array, judge(mx.array(rows), draft))
    kept = np.cumprod(accepted, 1).sum(1)
    text = np.concatenate([tokens, np.zeros((DRAWS, 1), int)], 1)
    text[np.arange(DRAWS), kept] = others[np.arange(DRAWS), kept]
    for at in (1, 2):  # what a step did not give
        before = text[:, 0] if at == 1 else text[:, 0] * VOCABULARY + text[:, 1]
        fresh = draw(model[at][before], rng)
        text[:, at] = np.where(kept < at, fresh, text[:, at])
    number = (text[:, 0] * VOCABULARY + text[:, 1]) * VOCABULARY + text[:, 2]
    joint = model[0][0][:, None] * model[1]
    joint = joint.reshape(-1, 1) * model[2]
    return np.bincount(number, minlength=VOCABULARY**3), joint.reshape(-1), kept


def deviation(counts, expected):
    """Of chi-square, in standard deviations (Wilson-Hilferty); rare outcomes count as one."""
    common = expected >= 10
    found = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    freedom, square = len(found) - 1, ((found - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    spread = 2 / (9 * freedom)
    return ((square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("kind", ["lookup", "mtp"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_distribution_is_the_models(kind, seed):
    counts, probs, kept = outcomes(kind, judge_sampled, seed)
    assert deviation(counts, probs * DRAWS) < LIKELY
    assert len(set(kept)) == DEPTH + 1


def always_from_p(probs, draft):
    """A rejected draft's place is taken by a token of p, and not of what p has more than q."""
    accepted, _ = judge_sampled(probs, draft)
    return accepted, mx.random.categorical(mx.log(probs))


def half_as_strict(probs, draft):
    """A draft that is rejected has another chance."""
    accepted, tokens = judge_sampled(probs, draft)
    return accepted | judge_sampled(probs, draft).accepted, tokens


@pytest.mark.parametrize("kind", ["lookup", "mtp"])
@pytest.mark.parametrize("rule", [always_from_p, half_as_strict])
def test_a_wrong_rule_is_found(kind, rule):
    counts, probs, _ = outcomes(kind, rule, 1)
    assert deviation(counts, probs * DRAWS) > UNLIKELY


@pytest.mark.parametrize("certain", [False, True])
def test_a_draft_that_is_as_likely_as_it_was_drawn_stays(certain):
    """Where p and q are the same nothing is left to draw from, and nothing has to be."""
    p = mx.softmax(mx.random.normal((VOCABULARY,), key=mx.random.key(3)) * (100 if certain else 1))
    probs = mx.broadcast_to(p, (1000, DEPTH + 1, VOCABULARY))
    tokens = mx.random.categorical(mx.log(probs[:, :DEPTH]))
    accepted, others = judge_sampled(probs, Draft(tokens, probs[:, :DEPTH]))
    assert mx.all(accepted).item()
    assert mx.all(others < VOCABULARY).item()


OPTIONS = [
    Options(temp=0.7),
    Options(temp=1.3, top_p=0.8),
    Options(temp=1.0, top_k=3),
    Options(temp=1.0, min_p=0.2),
    Options(temp=1.2, top_p=0.9, repetition_penalty=1.7, repetition_context_size=2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_drafts_are_judged_by_what_plain_sampling_draws_from(options, monkeypatch):
    """Temperature, nucleus and penalty, which sees the drafts before, are those of plain steps."""
    seen, draw_from = [], mx.random.categorical

    def spy(logits):
        seen.append(mx.softmax(logits.astype(mx.float32), axis=-1))
        return draw_from(logits)

    rng = np.random.default_rng(5)
    logits = mx.array(rng.normal(0, 1.5, (3, VOCABULARY)).astype(np.float32))
    draft = Draft(mx.array([4, 1], mx.uint32), mx.full((2, VOCABULARY), 1 / VOCABULARY))
    known = [0, 1, 2]
    plain = Choice(options, VOCABULARY, known)
    with monkeypatch.context() as patch:
        patch.setattr(mx.random, "categorical", spy)
        for row, token in enumerate([*draft.tokens.tolist(), 0]):
            plain.next(logits[row : row + 1] + 0)
            known.append(token)
    expected = mx.concatenate(seen)
    judging = Choice(options, VOCABULARY, [0, 1, 2])
    monkeypatch.setattr(module, "judge_sampled", lambda probs, _: probs)
    assert mx.allclose(judging.judge(logits + 0, draft), expected, 1e-5, 1e-7).item()
    ahead = [draft.tokens[:1], draft.tokens[1:]]
    for row in range(3):
        _, drawn_from = judging.draw(logits[row : row + 1] + 0, ahead[:row])
        assert mx.allclose(drawn_from[0], expected[row], 1e-5, 1e-7).item()
