"""What tests of kept prompts share: texts, caches of the bundled model, and made-up ones."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from glm_fused.generation.prompt_cache.store import PromptStore
from glm_fused.models.cache import bytes_per_token, empty_cache

SIZE = 16  # tokens a block; so few that texts have several


def some_tokens(model, rng, n):
    return [rng.randrange(model.args.vocab_size) for _ in range(n)]


def unlike_texts(model, rng, count, n):
    """So many texts of n tokens, of which no two begin with the same."""
    first = rng.sample(range(model.args.vocab_size), count)
    return [[token, *some_tokens(model, rng, n - 1)] for token in first]


def store_of(model, limit=1 << 30, **options):
    return PromptStore(model, limit, **{"block_tokens": SIZE} | options)


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


def made_up(model, tokens):
    """A cache of float32 rows that are digests of the tokens they follow from."""
    args = model.args
    widths = ((args.kv_lora_rank, args.qk_rope_head_dim), (args.index_head_dim, 0))

    def rows(salt, width):
        count = len(tokens)
        known = [np.array(tokens[: i + 1], np.uint32).tobytes() for i in range(count)]
        digests = [hashlib.blake2b(text, digest_size=32, salt=salt).digest() for text in known]
        made = [np.resize(np.frombuffer(digest, np.uint8), width) for digest in digests]
        return mx.array(np.array(made, np.float32).reshape(1, 1, count, width))

    def filled(spec):
        cache = empty_cache(spec)
        for j, entry in enumerate(cache.caches):
            salt = bytes([spec.index, j])
            entry.keys, entry.values = (rows(salt, width) for width in widths[j])
            entry.offset = len(tokens)
        return cache

    return [filled(spec) for spec in args.layers]


def same_rows(a, b):
    return all(
        mx.array_equal(x.keys[..., : x.offset, :], y.keys[..., : y.offset, :]).item()
        and mx.array_equal(x.values[..., : x.offset, :], y.values[..., : y.offset, :]).item()
        for i, k in zip(a, b, strict=True)
        for x, y in zip(i.caches, k.caches, strict=True)
    )


def put(store, model, tokens):
    store.put(tokens, made_up(model, tokens))


def token_bytes(model):
    """Of a token's rows in the format of the activations, and of the token itself."""
    return bytes_per_token(model.args, "fp32") - _mtp_bytes(model) + 4


def _mtp_bytes(model):
    args = model.args
    return 4 * (args.kv_lora_rank + args.qk_rope_head_dim + args.index_head_dim)
