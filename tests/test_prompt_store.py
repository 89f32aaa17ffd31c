"""Caches that are kept: a text that goes on from one has the bits of its whole prompt."""

from __future__ import annotations

import hashlib
import random

import mlx.core as mx
import numpy as np
import pytest

import glm_fused
from glm_fused.formats.kv_rows import KV_FORMATS
from glm_fused.generation.prompt_store import PromptStore
from glm_fused.models.cache import empty_cache

SIZE = 16  # tokens a block; so few that texts have several


@pytest.fixture(scope="module")
def model():
    return glm_fused.load_model("demo", mtp=True)[0]


@pytest.fixture(autouse=True)
def own_format(request):
    if "model" in request.fixturenames:
        request.getfixturevalue("model").kv_format = "auto"


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def some_tokens(model, rng, n):
    return [rng.randrange(model.args.vocab_size) for _ in range(n)]


def store_of(model, limit=1 << 30, **options):
    return PromptStore(model, limit, block_tokens=SIZE, **options)


def feed(model, tokens, cache=None, steps=(10**6,)):
    """The logits [l, vocabulary] of tokens, taken so many at a time; the last number goes on."""
    cache = model.make_cache() if cache is None else cache
    parts, done, steps = [], 0, list(steps)
    while done < len(tokens):
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        parts.append(model(mx.array([tokens[done : done + step]]), cache)[0])
        mx.eval(parts[-1])
        done += step
    return cache, np.array(mx.concatenate(parts).astype(mx.float32))


def goes_on(model, store, text):
    """How many tokens of a text the store has, and whether the others' logits have the bits that
    they have without it."""
    cache, n = store.take(text[:-1])
    assert {entry.offset for layer in cache for entry in layer.caches} == {n}
    _, found = feed(model, text[n:], cache, (3, 1, 40))
    _, expected = feed(model, text)
    return n, np.array_equal(found, expected[n:])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("steps", [(1000,), (33, 1)], ids=str)
def test_a_text_goes_on_with_the_bits_of_its_whole_prompt(model, rng, kv_format, steps):
    """From rows of prompts and of decode steps, cut in the middle of a block and at its ends."""
    model.kv_format = kv_format
    text = some_tokens(model, rng, rng.choice([81, 93, 96]))
    store = store_of(model)
    store.put(text, feed(model, text, steps=steps)[0])
    for n in (1, rng.choice([SIZE - 1, SIZE, SIZE + 1]), rng.randrange(2, 80), len(text) - 1):
        other = text[:n] + some_tokens(model, rng, 5)
        assert goes_on(model, store, other) == (n, True)


def test_a_wrong_row_would_be_seen(model, rng):
    """The control of the tests above: one row of another text changes what follows."""
    text = some_tokens(model, rng, 60)
    other = [*text[:20], (text[20] + 1) % 2048, *text[21:]]
    store = store_of(model)
    store.put(text, feed(model, other)[0])
    assert goes_on(model, store, text) == (59, False)


def test_what_goes_on_changes_nothing_that_is_kept(model, rng):
    text = some_tokens(model, rng, 50)
    cache, _ = feed(model, text)
    store = store_of(model)
    store.put(text, cache)
    feed(model, some_tokens(model, rng, 30), cache)
    for _ in range(2):
        taken, n = store.take(text)
        assert n == 50
        feed(model, some_tokens(model, rng, 30), taken)
        for layer in taken:
            layer.trim(40)
        feed(model, some_tokens(model, rng, 30), taken, (1,))
    assert goes_on(model, store, [*text, 7, 8]) == (50, True)


def made_up(model, tokens, drafted):
    """Caches of float32 rows that are digests of the tokens they follow from; and the MTP's."""
    args = model.args
    widths = ((args.kv_lora_rank, args.qk_rope_head_dim), (args.index_head_dim, 0))

    def rows(count, ahead, salt, width):
        known = [np.array(tokens[: i + ahead], np.uint32).tobytes() for i in range(count)]
        digests = [hashlib.blake2b(text, digest_size=32, salt=salt).digest() for text in known]
        made = [np.resize(np.frombuffer(digest, np.uint8), width) for digest in digests]
        return mx.array(np.array(made, np.float32).reshape(1, 1, count, width))

    def filled(spec, count, ahead):
        cache = empty_cache(spec)
        for j, entry in enumerate(cache.caches):
            salt = bytes([spec.index, j])
            entry.keys, entry.values = (rows(count, ahead, salt, width) for width in widths[j])
            entry.offset = count
        return cache

    cache = [filled(spec, len(tokens), 1) for spec in args.layers]
    return cache, filled(args.mtp_layers[0], drafted, 2)


def same_rows(a, b):
    return all(
        mx.array_equal(x.keys[..., : x.offset, :], y.keys[..., : y.offset, :]).item()
        and mx.array_equal(x.values[..., : x.offset, :], y.values[..., : y.offset, :]).item()
        for i, k in zip(a, b, strict=True)
        for x, y in zip(i.caches, k.caches, strict=True)
    )


def shared(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@pytest.mark.parametrize("drafts", [False, True])
def test_the_longest_prefix_that_any_text_has_is_found(model, rng, drafts):
    """Of texts that share beginnings, with rows that tell the text that they are of."""
    store, known = store_of(model), []
    for _ in range(25):
        base = rng.choice(known)[: rng.randrange(60)] if known and rng.random() < 0.8 else []
        text = base + [rng.randrange(2) for _ in range(rng.randrange(1, 60))]
        expected = max((shared(text, other) for other in known), default=0)
        found = store.take_drafted(text)
        assert found.tokens == expected
        if expected:
            whole, draft = made_up(model, text[:expected], expected - 1)
            assert same_rows(found.cache, whole)
            if drafts and expected > 1:
                assert (found.drafted, same_rows([found.draft], [draft])) == (expected - 1, True)
        assert found.drafted == (max(0, expected - 1) if drafts else 0)
        store.put(text, *made_up(model, text, len(text) - 1)[: 1 + drafts])
        known.append(text)
    described = store.describe()
    assert described["asked"] == 25 and described["hit_tokens"] > 0
    assert described["tokens"] <= sum(map(len, known))
