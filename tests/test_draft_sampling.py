"""Sampling draws what it draws without drafts, and that has the model's distribution."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_drafts import CODE, Planted, decode, kept, same

from glm_fused import Engine, EngineOptions
from glm_fused.generation import choice as module
from glm_fused.generation.choice import Choice, Keys
from glm_fused.generation.decoding import Drafting
from glm_fused.generation.drafts.depth import Depth
from glm_fused.generation.options import Options

DRAWS, LENGTH, VOCABULARY = 3000, 2, 8
LIKELY, UNLIKELY = 4.0, 8.0  # standard deviations; the seeds are fixed
OPTIONS = [
    Options(temp=0.7),
    Options(temp=1.3, top_p=0.8),
    Options(temp=1.0, top_k=3),
    Options(temp=1.0, min_p=0.2),
    Options(temp=1.2, top_p=0.9, repetition_penalty=1.7, repetition_context_size=2),
]


@pytest.fixture(scope="module")
def engine():
    with Engine("demo") as engine:
        yield engine


def tables(seed):
    """A model of VOCABULARY tokens: the probabilities after none and after one."""
    rng = np.random.default_rng(seed)
    return [
        rng.dirichlet(np.full(VOCABULARY, 0.6), VOCABULARY**n).astype(np.float32)
        for n in range(LENGTH)
    ]


def drawn(model, first):
    """DRAWS texts of LENGTH tokens, each with a seed of its own, as numbers."""
    logits, texts = [mx.log(mx.array(probs)) for probs in model], []
    for seed in range(first, first + DRAWS):
        choice, ahead = Choice(Options(temp=1.0, seed=seed), VOCABULARY, [0]), []
        number = mx.array([0], mx.uint32)
        for rows in logits:
            ahead.append(choice.next(rows[number], ahead))
            number = number * VOCABULARY + ahead[-1]
        texts.append(number)
    return np.array(mx.concatenate(texts))


def deviation(numbers, model):
    """As `standardized` has it (Wilson and Hilferty's); rare outcomes count as one."""
    expected = (model[0][0][:, None] * model[1]).reshape(-1) * DRAWS
    counts, common = np.bincount(numbers, minlength=len(expected)), expected >= 10
    found = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    return standardized(found, wanted, len(found) - 1)


def standardized(found, wanted, freedom):
    """How far chi-square of counts is from its average, in standard deviations."""
    square = ((found - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    spread = 2 / (9 * freedom)
    return ((square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("seed", [1, 2])
def test_the_distribution_is_the_models(seed):
    model = tables(seed)
    assert deviation(drawn(model, seed * DRAWS), model) < LIKELY


def test_a_wrong_key_is_found(monkeypatch):
    """Places that share a key draw alike."""
    at = Keys.at
    monkeypatch.setattr(Keys, "at", lambda self, place: at(self, 0))
    model = tables(1)
    assert deviation(drawn(model, DRAWS), model) > UNLIKELY


def test_keys_are_those_of_mlxs_generator():
    """However they are asked for, and each once a text has come to its place."""
    mx.random.seed(2**40 + 7)
    expected = [mx.random.uniform().item() for _ in range(9)]
    keys = Keys(2**40 + 7)
    for place in (0, 3, 1, 8, 8, 5):
        assert mx.random.uniform(key=keys.at(place)).item() == expected[place]
    keys.forget(4)
    assert [mx.random.uniform(key=keys.at(n)).item() for n in range(4, 9)] == expected[4:]
    assert Keys(None).at(0).tolist() != Keys(None).at(0).tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_what_is_drawn_beside_drafts_is_what_is_drawn_without(options):
    """Temperature, nucleus and penalty, which sees the drafts before, are those of plain steps."""
    for seed in range(20):
        rng, how = np.random.default_rng(seed), replace(options, seed=seed)
        logits = mx.array(rng.normal(0, 1.5, (4, VOCABULARY))).astype(mx.float32)
        draft, known = mx.array(rng.integers(0, VOCABULARY, 3), mx.uint32), [0, 1, 2]
        judged = Choice(how, VOCABULARY, list(known)).judge(logits, draft).tolist()
        text = list(known)
        ahead, plain = Choice(how, VOCABULARY, list(known)), Choice(how, VOCABULARY, text)
        for row, token in enumerate([*draft.tolist(), 0]):
            drafts = [draft[:row]] if row else []
            assert ahead.next(logits[row : row + 1], drafts).item() == judged[row]
            assert plain.next(logits[row : row + 1]).item() == judged[row]
            text.append(token)


def test_how_many_tokens_of_a_draft_stay():
    for draft, chosen, expected in (
        ([5, 6, 7], [5, 6, 7, 8], 3),
        ([5, 6, 7], [5, 9, 7, 8], 1),
        ([5], [4, 4], 0),
        ([], [3], 0),
    ):
        assert module.kept(draft, chosen) == expected


@pytest.mark.parametrize("depth", [1, 3, 8, "auto"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_sampled_texts_are_those_without_drafts(engine, depth, penalty):
    how = {"temp": 0.9, "top_k": 50, "repetition_penalty": penalty}
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    plain = decode(model, prompt, seed=11, **how)
    drafting = Drafting(Planted(prompt + plain[0]), Depth(depth))
    drafted = decode(model, prompt, drafting, seed=11, **how)
    assert same(drafted, plain)
    assert depth == "auto" or kept(drafted[2]) > 0
    assert plain[0] != decode(model, prompt, seed=12, **how)[0]


def test_drafts_of_the_layer_are_drawn_with_the_keys_of_their_places(monkeypatch):
    """So more of them stay than of drafts that are drawn with others."""
    sampling = {"max_tokens": 60, "temp": 1.0, "seed": 3, "raw": True}
    with Engine("demo", EngineOptions(draft=1, draft_from="mtp")) as engine:
        found = engine.generate(CODE, **sampling)
        assert found.tokens == engine.generate(CODE, **sampling).tokens
        following = Choice.next
        others = Choice(Options(temp=1.0, seed=99), engine.model.args.vocab_size, [])

        def draw(self, logits, ahead=()):
            """Of drafts, which are drawn first, with other keys."""
            return following(others, logits) if others.drafting else following(self, logits, ahead)

        from glm_fused.generation.drafts.mtp import MtpDrafter

        propose = MtpDrafter.propose

        def proposing(self, kind, depth, draw):
            others.drafting = True
            try:
                others._known.append(0)
                return propose(self, kind, depth, draw)
            finally:
                others.drafting = False

        others.drafting = False
        monkeypatch.setattr(Choice, "next", draw)
        monkeypatch.setattr(MtpDrafter, "propose", proposing)
        other = engine.generate(CODE, **sampling)
    assert other.tokens == found.tokens
    assert found.drafts["acceptance"][0] > other.drafts["acceptance"][0]
