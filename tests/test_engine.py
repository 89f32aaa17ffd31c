"""The engine does for a library user what the command line does."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from mlx_lm.models.cache import save_prompt_cache

import glm_fused
from glm_fused import Engine, EngineOptions
from glm_fused.generation.options import Options
from glm_fused.streaming.options import StreamOptions

PROMPT = "def main():"


@pytest.fixture(scope="module")
def streamed():
    with Engine("demo", EngineOptions(slots=4, context=40)) as engine:
        yield engine


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("bare"), tiny_config())


def bits(logits):
    return np.array(logits.view(mx.uint16))


def test_it_generates_what_the_functions_do(engine):
    model, tokenizer = glm_fused.load("demo")
    options = {"max_tokens": 8, "temp": 0.8, "seed": 4}
    expected = glm_fused.generate(model, tokenizer, PROMPT, **options)
    shown = []
    found = engine.generate(PROMPT, None, shown.append, **options)
    assert (found.text, found.tokens) == (expected.text, expected.tokens)
    assert "".join(shown) == expected.text
    pieces = list(engine.stream(PROMPT, **options))
    assert [piece.token for piece in pieces] == expected.tokens
    assert engine.encode(PROMPT) == tokenizer.encode(PROMPT)
    assert (engine.defaults, engine.streaming) == (Options(), None)
    assert engine.context == engine.config["max_position_embeddings"]


def test_steps_are_the_models(engine):
    tokens = mx.array([[5, 9, 200, 7, 3]])
    cache = engine.make_cache()
    prompt = engine.step(tokens[:, :4], cache)
    last = engine.step(tokens[:, 4:], cache)
    assert prompt.shape == (1, 4, engine.model.args.vocab_size)
    whole = engine.model(tokens)
    assert np.array_equal(bits(mx.concatenate([prompt, last], axis=1)), bits(whole))
    assert np.array_equal(bits(engine.step(tokens)), bits(whole))


def test_a_streamed_engine_has_the_same_bits(engine, streamed):
    tokens = mx.array([[5, 9, 200, 7, 3, 3, 8]])
    assert np.array_equal(bits(streamed.step(tokens)), bits(engine.step(tokens)))
    assert streamed.streaming.plan.slots == 4
    assert streamed.streaming.stats()["misses"] > 0


def test_a_streamed_engine_keeps_to_the_context_that_was_planned(streamed):
    assert streamed.context == 40
    with pytest.raises(ValueError, match=r"exceed the context of 40 tokens, for which memory"):
        streamed.generate([5, 6, 7], max_tokens=38)
    with pytest.raises(ValueError, match="is 40 tokens, expected 1 to 39"):
        streamed.encode([5] * 40)
    cache = streamed.make_cache()
    streamed.step(mx.zeros((1, 39), mx.int32), cache)
    with pytest.raises(ValueError, match="39 cached and 2 new tokens, expected at most 40, for"):
        streamed.step(mx.zeros((1, 2), mx.int32), cache)
    streamed.step(mx.zeros((1, 1), mx.int32), cache)
    for wrong in (mx.zeros((1, 1)), mx.zeros((3,), mx.int32)):
        with pytest.raises(ValueError, match=r"\[model\] tokens must be"):
            streamed.step(wrong)


def test_a_budget_that_is_too_small_says_what_would_fit():
    with pytest.raises(ValueError, match=r"\[budget\] 50.00 MB cannot hold .* would fit"):
        Engine("demo", EngineOptions(memory_budget="50MB"))


def test_a_prompt_cache_goes_through_a_file(engine, tmp_path):
    cache, tokens = engine.make_cache(), mx.array([[5, 9, 200, 7]])
    engine.step(tokens[:, :3], cache)
    save_prompt_cache(str(tmp_path / "kv.safetensors"), cache)
    expected = engine.step(tokens[:, 3:], cache)
    loaded = engine.load_cache(tmp_path / "kv.safetensors")
    assert np.array_equal(bits(engine.step(tokens[:, 3:], loaded)), bits(expected))


def test_a_kv_format_is_that_of_the_caches():
    with Engine("demo", EngineOptions(kv_format="fp8")) as engine:
        cache = engine.make_cache()
        mx.eval(engine.step(mx.array([[5, 9]]), cache))
        assert cache[0][0].keys.dtype == mx.uint8


def test_closing_lets_the_model_go():
    limit = mx.set_cache_limit(123 << 20)
    try:
        engine = Engine("demo", EngineOptions(slots=4))
        assert mx.set_cache_limit(0) != 123 << 20
        engine.close()
        engine.close()
        assert mx.set_cache_limit(limit) == 123 << 20
    finally:
        mx.set_cache_limit(limit)
    for use in (lambda: engine.step(mx.array([[1]])), lambda: engine.tokenizer):
        with pytest.raises(ValueError, match=r"\[engine\] the engine of .*demo_model is closed"):
            use()


def test_an_engine_that_does_not_load_gives_the_limit_back(bare, tmp_path):
    (bare / "tokenizer_config.json").write_text("[]")
    limit = mx.set_cache_limit(123 << 20)
    try:
        with pytest.raises(ValueError, match="tokenizer"):
            Engine(bare, EngineOptions(slots=4))
        assert mx.set_cache_limit(limit) == 123 << 20
    finally:
        mx.set_cache_limit(limit)
        (bare / "tokenizer_config.json").unlink()


def test_a_checkpoint_without_a_tokenizer(bare):
    with pytest.raises(FileNotFoundError, match="has no tokenizer_config"):
        Engine(bare)
    with Engine(bare, tokenizer=False, lazy=True) as engine:
        assert engine.step(mx.array([[5]])).shape == (1, 1, 256)
        with pytest.raises(ValueError, match="without its tokenizer"):
            engine.generate("x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "fp7"}, "expected one of auto"),
        ({"slots": "4"}, "slots is '4', expected an integer"),
        ({"slots": True}, "slots is True, expected an integer"),
        ({"context": 4.0, "slots": 4}, "context is 4.0, expected an integer"),
        ({"slots": 0}, "slots is 0, expected an integer from 1 to"),
        ({"slots": 4, "lookahead": -1}, "lookahead is -1, expected an integer from 0 to"),
        ({"slots": 4, "read_depth": 257}, "read_depth is 257, expected an integer from 1 to 256"),
        ({"memory_budget": 0}, "memory_budget is 0, expected a number of bytes"),
        ({"memory_budget": 2.5}, "memory_budget is 2.5, expected a number of bytes"),
        ({"memory_budget": "24"}, "memory_budget: expected a size with its unit"),
        ({"memory_budget": 1 << 63}, "memory_budget is"),
        ({"read_split": "auto", "slots": 4}, "read_split: expected a size with its unit"),
        ({"context": 64}, "context: needs memory_budget, slots or sidecar"),
        ({"policy": "lru", "lookahead": 0}, "policy, lookahead: needs memory_budget"),
        ({"policy": "pinned", "slots": 4}, "pins and policy 'pinned' need one another"),
        ({"pins": {1: [0]}, "slots": 4}, "pins and policy 'pinned' need one another"),
        ({"pins": {1: [0]}}, "pins: needs memory_budget"),
        ({"policy": "best", "slots": 4}, "policy is 'best', expected one of learned, lru"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


def test_options_become_those_of_streaming():
    assert EngineOptions().stream_options() is None
    assert EngineOptions(memory_budget="auto").stream_options() == StreamOptions()
    options = EngineOptions(
        memory_budget="24GB", context=64, policy="pinned", pins={1: [0]}, lookahead=2,
        direct_io=True, read_depth=3, read_split="8KiB", default_context=9,
    )  # fmt: skip
    assert options.stream_options() == StreamOptions(
        budget=24 * 10**9, context=64, policy="pinned", pins={1: [0]}, spares=2, direct=True,
        depth=3, split=8192, default_context=9,
    )  # fmt: skip
