"""Caches that are kept: a text that goes on from one has the bits of its whole prompt."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from kept_prompts import (
    SIZE,
    feed,
    goes_on,
    made_up,
    put,
    same_rows,
    some_tokens,
    store_of,
    token_bytes,
    unlike_texts,
)
from mlx_lm.models.cache import BatchKVCache, CacheList

from glm_fused import Engine, EngineOptions
from glm_fused.formats.kv_rows import KV_FORMATS


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


def shared(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_the_longest_prefix_that_any_text_has_is_found(model, rng):
    """Of texts that share beginnings, with rows that tell the text that they are of."""
    store, known = store_of(model), []
    for _ in range(20):
        base = rng.choice(known)[: rng.randrange(60)] if known and rng.random() < 0.8 else []
        text = base + [rng.randrange(2) for _ in range(rng.randrange(1, 60))]
        expected = max((shared(text, other) for other in known), default=0)
        cache, found = store.take(text)
        assert found == expected
        assert not expected or same_rows(cache, made_up(model, text[:expected]))
        put(store, model, text)
        known.append(text)
    described = store.describe()
    assert described["asked"] == 20 and described["hit_tokens"] > 0
    assert described["tokens"] <= sum(map(len, known))


def test_texts_share_what_they_have_in_common(model, rng):
    store, system = store_of(model), some_tokens(model, rng, 3 * SIZE)
    for i in range(4):
        put(store, model, [*system, i, i, i])
    described = store.describe()
    assert (described["prompts"], described["blocks"]) == (4, 3 + 4)
    assert described["tokens"] == 3 * SIZE + 4 * 3
    assert store.nbytes == described["bytes"] == described["tokens"] * token_bytes(model)


def test_a_longer_text_takes_the_place_of_its_beginning(model, rng):
    store, text = store_of(model), some_tokens(model, rng, 100)
    for n in (1, 5, SIZE, SIZE + 3, SIZE + 3, 57, 30, 100, 99):
        put(store, model, text[:n])
    described = store.describe()
    assert (described["prompts"], described["tokens"]) == (1, 100)
    assert store.nbytes == 100 * token_bytes(model)


@pytest.mark.parametrize("tokens", [0, 1, 40, 100])
def test_memory_stays_within_the_limit(model, rng, tokens):
    """Whatever comes, and what was put last is there as far as whole blocks of it fit."""
    limit = tokens * token_bytes(model)
    store, known = store_of(model, limit), []
    assert store.limit_bytes == limit
    for _ in range(30):
        text = some_tokens(model, rng, rng.randrange(1, 60))
        if known and rng.random() < 0.5:
            base = rng.choice(known)
            store.take(base)
            text = base[: rng.randrange(len(base))] + text
        put(store, model, text)
        known.append(text)
        described = store.describe()
        assert store.nbytes == described["tokens"] * token_bytes(model) <= limit
        expected = len(text) if len(text) <= tokens else tokens // SIZE * SIZE
        assert store.take(text)[1] == expected
    assert described["evicted_blocks"] > 0 or tokens < SIZE


def test_what_was_not_used_for_longest_goes_first(model, rng):
    texts = unlike_texts(model, rng, 6, SIZE)
    store = store_of(model, 5 * SIZE * token_bytes(model))
    for text in texts[:5]:
        put(store, model, text)
    store.take(texts[0])
    put(store, model, texts[2])
    put(store, model, texts[5])
    assert [store.take(text)[1] > 0 for text in texts] == [True, False, True, True, True, True]


def test_the_end_of_a_text_goes_before_its_beginning(model, rng):
    text = some_tokens(model, rng, 4 * SIZE)
    store = store_of(model, 3 * SIZE * token_bytes(model))
    put(store, model, text)
    assert store.take(text)[1] == 3 * SIZE
    put(store, model, other := some_tokens(model, rng, SIZE))
    assert (store.take(text)[1], store.take(other)[1]) == (2 * SIZE, SIZE)
    assert store.describe()["evicted_blocks"] == 1


def test_what_is_no_cache_of_the_model_is_refused(model, rng):
    store, text = store_of(model), some_tokens(model, rng, 20)
    cache = made_up(model, text)
    batch = [CacheList(*(BatchKVCache.merge([e]) for e in layer.caches)) for layer in cache]
    for wrong, message in (
        (cache[:-1], "one entry per layer"),
        (batch, "found a BatchKVCache, expected a KVCache"),
        ([*cache[:-1], cache[0]], "layer 6"),
    ):
        with pytest.raises(ValueError, match=message):
            store.put(text, wrong)
    put(store, model, text)
    model.kv_format = "fp8"
    with pytest.raises(ValueError, match="a cache in fp8, expected fp32"):
        store.put(text, feed(model, text)[0])
    with pytest.raises(ValueError, match="at least 0"):
        store_of(model, -1)
    assert store.describe()["put"] == 1


def test_there_may_be_more_tokens_than_rows_or_fewer(model, rng):
    text = some_tokens(model, rng, 40)
    for tokens, rows in ((40, 33), (33, 40), (0, 5), (5, 0)):
        store = store_of(model)
        store.put(text[:tokens], made_up(model, text[:rows]) if rows else model.make_cache())
        assert store.take(text)[1] == min(tokens, rows)


def test_others_may_look_while_a_thread_takes_and_puts(model, rng):
    store, failed, done = store_of(model, 200 * token_bytes(model)), [], threading.Event()

    def look():
        try:
            while not done.is_set():
                found = store.describe()
                assert 0 <= found["bytes"] <= found["limit_bytes"]
                assert found["bytes"] == found["tokens"] * token_bytes(model)
        except BaseException as error:
            failed.append(error)

    def work():
        try:
            for _ in range(8):
                text = [rng.randrange(3) for _ in range(rng.randrange(1, 90))]
                put(store, model, text)
                assert goes_on_rows(model, store, text)
        except BaseException as error:
            failed.append(error)

    looking, working = threading.Thread(target=look), threading.Thread(target=work)
    looking.start(), working.start()
    working.join()
    done.set()
    looking.join()
    assert not failed


def goes_on_rows(model, store, text):
    cache, n = store.take(text)
    return n and same_rows(cache, made_up(model, text[:n]))


def test_a_memory_budget_counts_what_prompts_may_take():
    options = EngineOptions(memory_budget="8GB", slots=8, prompt_cache="64MB")
    with Engine("demo", options) as engine, engine.prompt_store() as store:
        plan = engine.streaming.plan
        assert plan.shares.prompts == 64 * 10**6 == store.describe()["limit_bytes"]
        assert "prompt cache     64.00 MB  of earlier prompts" in plan.format()
        without = replace(plan.shares, prompts=0)
        assert plan.shares.total == without.total + 64 * 10**6
    with pytest.raises(ValueError, match=r"7\.00 GB for earlier prompts, .* or no prompt cache"):
        Engine("demo", replace(options, memory_budget="7.05GB", prompt_cache="7GB"))
    with pytest.raises(ValueError, match=r"prompt_cache is 0, expected a number of bytes"):
        EngineOptions(prompt_cache=0)
