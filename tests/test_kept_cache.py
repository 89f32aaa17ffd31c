"""A cache that goes from one generation to the next: the same tokens, few of them taken anew."""

import random
from contextlib import closing

import mlx.core as mx
import pytest

import glm_fused
from glm_fused.generation.decoding import Stopped
from glm_fused.generation.kept_cache import KeptCache
from glm_fused.models.decoder import Model

DRAFTS = [{}, {"draft": 3, "draft_from": "lookup"}, {"draft": 2, "draft_from": "mtp+lookup"}]


@pytest.fixture(scope="module", params=DRAFTS, ids=["plain", "lookup", "mtp+lookup"])
def engine(request):
    with glm_fused.Engine("demo", glm_fused.EngineOptions(**request.param)) as engine:
        yield engine


@pytest.fixture
def taken(monkeypatch):
    """How many tokens the model takes, call by call."""
    counts = []

    def counted(original):
        def call(self, tokens, *args, **kwargs):
            counts.append(tokens.shape[1])
            return original(self, tokens, *args, **kwargs)

        return call

    for name in ("__call__", "states"):
        monkeypatch.setattr(Model, name, counted(getattr(Model, name)))
    return counts


def alone(engine, tokens, n):
    return engine.generate(tokens, max_tokens=n, temp=0.0).tokens


def test_turns_have_the_tokens_that_they_have_alone(engine):
    kept, rng = KeptCache(engine.model), random.Random()
    tokens = engine.encode("import os\n\n\ndef main(path):\n", raw=True)
    for _ in range(4):
        n = rng.randrange(1, 40)
        pieces = engine.stream(tokens, max_tokens=n, temp=0.0, caches=kept)
        got = [piece.token for piece in pieces]
        assert got == alone(engine, tokens, n)
        assert kept.tokens == (tokens + got)[: len(kept.tokens)]
        assert len(kept.tokens) >= len(tokens) + len(got) - 1
        words = rng.choices(["def", "x", "return", "(", ")", "=", "1"], k=25)
        tokens = [*tokens, *got, *engine.encode(" ".join(words), raw=True)]


def test_only_new_tokens_are_taken(engine, taken):
    kept, prompt = KeptCache(engine.model), engine.encode("x = 1\n" * 300, raw=True)
    first = [piece.token for piece in engine.stream(prompt, max_tokens=8, temp=0.0, caches=kept)]
    assert sum(taken) >= len(prompt)
    taken.clear()
    new = engine.encode("y = 2\nz", raw=True)
    progress = []

    def on_progress(what, done, total):
        if what == "prompt":
            progress.append((done, total))

    longer = [*prompt, *first, *new]
    pieces = engine.stream(longer, max_tokens=1, temp=0.0, caches=kept, on_progress=on_progress)
    list(pieces)
    assert progress[0][1] == len(longer)
    assert len(longer) - progress[0][0] <= len(new) + 1
    # A last token that nobody asked for may be on its way, and drafts are taken too.
    assert sum(taken) <= len(new) + 1 + 8


@pytest.mark.parametrize("end", ["closed", "stopped", "stopped in the prompt"])
def test_what_is_stopped_leaves_a_whole_cache(engine, end):
    prompt = engine.encode("for i in range(10):\n    print(i)\n" * 9, raw=True)
    kept, n = KeptCache(engine.model), random.randrange(2, 12)
    got = []

    def on_progress(what, done, total):
        if end == "stopped" and what == "generation" and done == n:
            raise Stopped
        if end == "stopped in the prompt" and done == total:
            raise Stopped

    pieces = engine.stream(prompt, max_tokens=30, temp=0.0, caches=kept, on_progress=on_progress)
    with closing(pieces):
        try:
            for piece in pieces:
                got.append(piece.token)
                if end == "closed" and len(got) == n:
                    break
        except Stopped:
            assert end != "closed"
    assert kept.tokens[: len(prompt)] == prompt
    changed = [*prompt[:-3], *engine.encode("while", raw=True)]
    for tokens in (prompt, changed, [*changed, *prompt]):
        again = engine.stream(tokens, max_tokens=9, temp=0.0, caches=kept)
        assert [piece.token for piece in again] == alone(engine, tokens, 9)


def test_a_failure_leaves_no_cache(engine):
    kept, prompt = KeptCache(engine.model), engine.encode("x = 1\n", raw=True)

    def on_progress(what, done, total):
        raise KeyError(what)

    with pytest.raises(KeyError):
        list(engine.stream(prompt, max_tokens=3, caches=kept, on_progress=on_progress))
    assert kept.tokens == []
    assert kept.nbytes == 0
    assert kept.take(prompt)[1] == 0


def test_a_cache_of_other_tokens_is_refused_and_would_be_noticed(engine):
    kept, prompt = KeptCache(engine.model), engine.encode("class Tree:\n    def", raw=True)
    list(engine.stream(prompt, max_tokens=5, temp=0.0, caches=kept))
    cache, cached = kept.take(prompt)
    assert 0 < cached == len(prompt) - 1
    with pytest.raises(ValueError, match=f"has {cached} tokens, expected {cached - 1}"):
        kept.put(prompt[: cached - 1], cache)
    # The control: what it says it has are other tokens, and the text is another.
    others = engine.encode("import os, sys, re, json, ast, io", raw=True)[:cached]
    assert len(others) == cached
    kept.put(others, cache)
    tokens = [*others, *engine.encode("\n\n", raw=True)]
    step = engine.step(mx.array([tokens]))
    cache, cached = kept.take(tokens)
    other = engine.step(mx.array([tokens[cached:]]), cache)
    assert not mx.array_equal(step[0, -1], other[0, -1])
