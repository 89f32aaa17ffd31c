"""A recorded decode step has the bits of the reference, whatever came before it."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from formats_under_test import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, CacheList
from mlx_lm.tuner.lora import LoRALinear

import glm_fused
from glm_fused import _ext, reference_path
from glm_fused.formats.weights import FORMATS, Weight
from glm_fused.loader import load_model
from glm_fused.models import decode_step
from glm_fused.models.chains import Drafting
from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model
from glm_fused.models.rope import ROWS_PAGE
from glm_fused.ops import paths

pytestmark = pytest.mark.usefixtures("several_threads")

VOCABULARY = 256
Decoding = _ext.Decoding


@pytest.fixture(autouse=True)
def on_a_cpu():
    if mx.default_device() != mx.cpu:
        pytest.skip("recorded steps are a CPU's")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One whose indexer leaves keys out from the seventeenth on, in bfloat16 and four bits."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("tiny"),
        tiny_config(index_topk=16),
        quantization={"group_size": 32, "bits": 4},
    )
    return load_model(path)[0]


@pytest.fixture
def recorded(monkeypatch):
    """How often steps were recorded, and run."""
    counts = {"recorded": 0, "run": 0}

    record = decode_step.record

    def counted(*args):
        counts["recorded"] += 1
        return record(*args)

    class Counted:
        def __init__(self, *args):
            self.decoding = Decoding(*args)

        def __call__(self, *args):
            logits = self.decoding(*args)
            counts["run"] += logits is not None
            return logits

    monkeypatch.setattr(decode_step, "record", counted)
    monkeypatch.setattr(_ext, "Decoding", Counted)
    return counts


def tokens_of(rng, batch, length):
    return mx.array(rng.integers(0, VOCABULARY, (batch, length)))


def make_cache(model, padding):
    if padding is None:
        return model.make_cache()
    kinds = model.make_cache()
    return [CacheList(*(BatchKVCache(padding) for _ in layer.caches)) for layer in kinds]


class Conversation:
    """A cache and the tokens that it holds, from which the reference makes it anew."""

    def __init__(self, model, padding, batch):
        self.model, self.padding = model, padding
        self.cache = make_cache(model, padding)
        self.tokens = mx.zeros((batch, 0), mx.int32)

    def fork(self):
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def append(self, tokens):
        self.tokens = mx.concatenate([self.tokens, tokens], axis=1)
        return self.model(tokens, self.cache)[:, -1]

    def trim(self, n):
        n = min(n, self.tokens.shape[1])
        for layer in self.cache:
            layer.trim(n)
        self.tokens = self.tokens[:, : self.tokens.shape[1] - n]

    def expected(self):
        with reference_path():
            return self.model(self.tokens, make_cache(self.model, self.padding))[:, -1]


def play(data, model):
    """Steps of some conversations; the logits of each last one, and what they ought to be."""
    model.kv_format = data.draw(st.sampled_from(["auto", "fp8", "int8", "fp32"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch = data.draw(st.integers(1, 3))
    padding = data.draw(st.sampled_from([None, [3, 0, 1][:batch]]))
    first = Conversation(model, padding, batch)
    first.append(tokens_of(rng, batch, data.draw(st.integers(4, 20))))
    conversations, pairs = [first], []
    for _ in range(data.draw(st.integers(1, 8))):
        which = data.draw(st.sampled_from(conversations))
        step = data.draw(st.sampled_from(["token", "token", "tokens", "fork", "trim"]))
        if step == "fork":
            conversations.append(which.fork())
        elif step == "trim" and which.tokens.shape[1] > 5:
            which.trim(data.draw(st.integers(1, 4)))
        else:
            length = 1 if step == "token" else data.draw(st.integers(2, 16 // batch))
            found = which.append(tokens_of(rng, batch, length))
            if data.draw(st.booleans()):
                mx.eval(found)
            pairs.append((found, which.expected()))
    return pairs


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_steps_equal_the_reference(model, data):
    """Batches with and without padding, several tokens, forks and trims of a cache."""
    try:
        for found, expected in play(data, model):
            assert_same_bits(found, expected)
    finally:
        model.kv_format = "auto"


def test_an_index_that_is_off_is_caught(model, monkeypatch):
    """The control of the test above: rows that are appended one column too late."""

    class Late:
        def __init__(self, *args):
            self.decoding = Decoding(*args)

        def __call__(self, tokens, cache, given, embedded=None):
            for layer in cache:
                for entry in layer.caches:
                    entry.offset += 1
            return self.decoding(tokens, cache, given, embedded)

    fresh = copy.deepcopy(model)
    cache, tokens = fresh.make_cache(), mx.array([[1, 2, 3, 4, 5, 6]])
    with reference_path():
        right = fresh(tokens, fresh.make_cache())[:, -1]
    mx.eval(fresh(tokens[:, :5], cache))
    monkeypatch.setattr(_ext, "Decoding", Late)
    late = fresh(tokens[:, 5:], cache)[:, -1]
    assert not np.array_equal(np.array(late.view(mx.uint16)), np.array(right.view(mx.uint16)))


@pytest.mark.parametrize("kv_format", ["auto", "fp8", "int8"])
def test_a_step_is_recorded_once(model, recorded, kv_format):
    fresh = copy.deepcopy(model)
    fresh.kv_format = kv_format
    for _ in range(2):
        cache = fresh.make_cache()
        logits = fresh(mx.array([[1, 2, 3]]), cache)
        for _ in range(300):  # the caches grow on the way
            logits = fresh(mx.argmax(logits[:, -1:], axis=-1), cache)
        mx.eval(logits)
    # One for as many keys as are selected, one for more.
    assert recorded == {"recorded": 2, "run": 600}


def trained(model, cache):
    model.train()


def with_another_weight(model, cache):
    norm = model.layers[2].self_attn.q_a_layernorm
    norm.weight = norm.weight * 1.5


def with_another_layer(model, cache):
    model.model.layers = list(reversed(model.layers))


def at_the_end_of_the_context(model, cache):
    for layer in cache:
        for entry in layer.caches:
            entry.offset = model.args.max_position_embeddings


def in_a_shorter_layer(model, cache):
    cache[1].trim(1)


def with_other_keys(model, cache):
    cache[2][0].keys = mx.array(cache[2][0].keys)


def with_few_keys(model, cache):
    for layer in cache:
        layer.trim(10)


CHANGES = [
    trained, with_another_weight, with_another_layer, at_the_end_of_the_context,
    in_a_shorter_layer, with_other_keys, with_few_keys,
]  # fmt: skip


def decoding(model):
    """A model and a cache with more keys than it selects, whose next step follows another."""
    fresh = copy.deepcopy(model)
    fresh.eval()
    cache = fresh.make_cache()
    for tokens in (mx.zeros((1, 20), mx.int32), mx.array([[7]])):
        mx.eval(fresh(tokens, cache))
    return fresh, cache


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_after_a_change_does_not_follow_the_last(model, change):
    token = mx.array([[9]])
    fresh, cache = decoding(model)
    assert fresh._steps.again(fresh, token, cache) is not None
    change(fresh, cache)
    assert fresh._steps.again(fresh, token, cache) is None


def test_a_step_elsewhere_does_not_follow_the_last(model, monkeypatch):
    token = mx.array([[9]])
    fresh, cache = decoding(model)
    others = [None, 5, fresh.make_cache(), decoding(model)[1], cache[:-1], [1, 2]]
    others += [[cache], [*cache, CacheList()]]
    assert [fresh._steps.again(fresh, token, other) for other in others] == [None] * len(others)
    others = [None, [[9]], token[0], mx.array([[9, 9]]), token.astype(mx.int64), token * 1.0]
    assert [fresh._steps.again(fresh, other, cache) for other in others] == [None] * len(others)
    with reference_path():
        assert fresh._steps.again(fresh, token, cache) is None
    with mx.stream(mx.new_stream(mx.cpu)):
        assert fresh._steps.again(fresh, token, cache) is None
    with monkeypatch.context() as patch:
        patch.setenv("GLM_FUSED_REFERENCE", "1")
        assert fresh._steps.again(fresh, token, cache) is None
        with reference_path(False):
            assert fresh._steps.again(fresh, token, cache) is None
    assert mx.compile(lambda x: x + (fresh._steps.again(fresh, x, cache) is None))(token) == 10
    threads = glm_fused.num_threads()
    try:
        glm_fused.set_num_threads(threads + 1)
        assert fresh._steps.again(fresh, token, cache) is None
    finally:
        glm_fused.set_num_threads(threads)
    assert cache[0][0].offset == 21
    assert fresh._steps.again(fresh, token, cache) is not None


def test_a_step_that_nobody_evaluates_is_part_of_the_cache(model):
    """Trimmed or not, a cache holds what its steps appended."""
    fresh, cache = decoding(model)
    for token in (3, 4, 5):
        fresh(mx.array([[token]]), cache)
    tokens = [*[0] * 20, 7, 3, 4, 5]
    for n in (0, 1):
        for layer in cache:
            layer.trim(n)
        tokens = [*tokens[: len(tokens) - n], 6]
        found = fresh(mx.array([[6]]), cache)[:, -1]
        with reference_path():
            assert_same_bits(found, fresh(mx.array([tokens]), fresh.make_cache())[:, -1])


def test_steps_of_rows_with_padding_follow_the_last_too(model):
    """Up to where the angles end that were made together; they have the bits of the reference."""
    it = Conversation(model, [3, 0, 1], 3)
    it.append(mx.array([[0, 0, 0, 4, 5], [1, 2, 3, 4, 5], [0, 7, 8, 9, 10]]))
    again, followed = model._steps.again, []

    def noted(model, tokens, *args):
        found = again(model, tokens, *args)
        if tokens.shape[1] == 1:
            followed.append(found is not None)
        return found

    model._steps.again = noted
    try:
        for i in range(ROWS_PAGE + 20):
            found = it.append(mx.array([[7 + i % 5], [8 + i % 7], [9 + i % 3]]))
            if i in (1, ROWS_PAGE + 12):
                assert_same_bits(found, it.expected())
    finally:
        del model._steps.again
    assert followed.count(False) <= 4  # the first, two pages and more keys than are selected
    assert followed.count(True) >= ROWS_PAGE


def other_array(entry):
    entry.left_padding = entry.left_padding + 1


def in_place(entry):
    entry.left_padding += 1


@pytest.mark.parametrize("change", [other_array, in_place])
def test_rows_with_other_padding_do_not_follow(model, change):
    fresh, cache, token = copy.deepcopy(model), make_cache(model, [3, 0]), mx.array([[7], [8]])
    mx.eval(fresh(mx.array([[0, 0, 0, 4, 5], [1, 2, 3, 4, 5]]), cache), fresh(token, cache))
    assert fresh._steps.again(fresh, token, cache) is not None
    change(cache[0][0])
    assert fresh._steps.again(fresh, token, cache) is None


def test_steps_keep_no_cache(model):
    """They are bound to where caches lie, and a trimmed one is written where it lies."""
    fresh, cache = decoding(model)
    held = mx.get_active_memory()
    for _ in range(3):
        for layer in cache:
            layer.trim(1)
        mx.eval(fresh(mx.array([[7]]), cache))
        mx.synchronize()
        assert mx.get_active_memory() == held
    size = sum(layer.nbytes for layer in cache)
    del cache, layer
    mx.synchronize()
    assert held - mx.get_active_memory() >= size


def test_what_is_replaced_is_noticed(model, recorded):
    fresh = copy.deepcopy(model)
    cache = fresh.make_cache()
    mx.eval(fresh(mx.array([[1, 2, 3]]), cache))

    def step():
        kept = copy.deepcopy(cache)
        found = fresh(mx.array([[7]]), kept)
        kept = copy.deepcopy(cache)
        with reference_path():
            expected = fresh(mx.array([[7]]), kept)
        assert_same_bits(found, expected)
        return recorded["recorded"], recorded["run"]

    assert step() == (1, 1)
    attention = fresh.layers[2].self_attn
    attention.q_a_layernorm.weight = attention.q_a_layernorm.weight * 1.5
    assert step() == (2, 2)
    assert step() == (2, 3)
    bias = mx.ones(attention.o_proj.weight.shape[:1])
    attention.o_proj.bias = bias
    assert step() == (2, 3)
    del attention.o_proj["bias"]
    assert step() == (3, 4)
    del attention["q_a_layernorm"]
    attention.q_a_norm = attention.q_b_proj
    assert not fresh._steps._parts.are_in_place(fresh)
    del attention["q_a_norm"]
    attention.q_a_layernorm = fresh.layers[1].self_attn.q_a_layernorm
    assert step() == (4, 5)
    fresh.train()
    before = recorded["run"]
    step()
    assert recorded["run"] == before


def test_adapters_are_left_to_the_ops(model, recorded):
    fresh = copy.deepcopy(model)
    attention = fresh.layers[0].self_attn
    attention.o_proj = LoRALinear.from_base(attention.o_proj, r=4)
    cache = fresh.make_cache()
    mx.eval(fresh(mx.array([[1, 2, 3]]), cache), fresh(mx.array([[1]]), cache))
    assert recorded["run"] == 0


def test_debug_output_says_how_steps_run(model, monkeypatch, caplog):
    monkeypatch.setenv("GLM_FUSED_DEBUG", "1")
    fresh = copy.deepcopy(model)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            cache = fresh.make_cache()
            mx.eval(fresh(mx.array([[1, 2, 3]] * 2), cache))
            mx.eval([fresh(mx.array([[1], [2]]), cache) for _ in range(2)])
        assert caplog.text.count("decode steps of 2 x 1 tokens run as one recorded node") == 1
        attention = fresh.layers[0].self_attn
        attention.o_proj = LoRALinear.from_base(attention.o_proj, r=4)
        mx.eval(fresh(mx.array([[1], [2]]), cache))
    assert "decode steps run layer by layer: weights are streamed, adapted" in caplog.text


def test_gradients_and_compiled_functions_are_left_to_the_layers(recorded):
    model = Model(args_from_config(tiny_config()))
    model.eval()
    mx.eval(model.parameters())

    def loss(model, step):
        cache = model.make_cache()
        model(mx.array([[1, 2, 3]]), cache)
        return model(step, cache).square().sum()

    token = mx.array([[4]])
    value, grads = nn.value_and_grad(model, loss)(model, token)
    assert recorded["run"] == 0
    assert mx.abs(grads["model"]["layers"][0]["self_attn"]["o_proj"]["weight"]).max().item() > 0
    compiled = mx.compile(lambda step: loss(model, step))
    assert_same_bits(compiled(token), value)
    assert recorded["run"] == 0
    assert_same_bits(loss(model, token), value)
    assert recorded["run"] == 1


def test_threads_have_their_own_steps(model):
    """They share the weights, not the memory of a step."""
    rng = np.random.default_rng(5)
    prompts = [tokens_of(rng, 1, 9) for _ in range(4)]
    results = [None] * len(prompts)

    def decode(i):
        with mx.stream(mx.new_thread_local_stream(mx.cpu)):
            cache = model.make_cache()
            logits = model(prompts[i], cache)
            for _ in range(20):
                logits = model(mx.argmax(logits[:, -1:], axis=-1), cache)
            mx.eval(logits)
            results[i] = np.array(logits.view(mx.uint16))

    for i in range(len(prompts)):
        decode(i)
    alone, results = results, [None] * len(prompts)
    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, results, strict=True):
        assert np.array_equal(a, b)


def test_a_number_of_threads_changes_nothing(model):
    def decode():
        cache = model.make_cache()
        logits = [model(mx.array([[1, 2, 3]]), cache)]
        for _ in range(20):
            logits.append(model(mx.argmax(logits[-1][:, -1:], axis=-1), cache))
        return mx.concatenate(logits[1:])

    before, threads = decode(), glm_fused.num_threads()
    try:
        for n in (1, 3):
            glm_fused.set_num_threads(n)
            assert_same_bits(decode(), before)
    finally:
        glm_fused.set_num_threads(threads)


def test_steps_are_no_part_of_a_copy():
    steps = decode_step.DecodeSteps(Drafting())
    assert type(pickle.loads(pickle.dumps(steps))) is decode_step.DecodeSteps


def test_what_does_not_fit_is_refused(model):
    fresh = copy.deepcopy(model)
    cache = fresh.make_cache()
    mx.eval(fresh(mx.array([[1, 2, 3]]), cache), fresh(mx.array([[1]]), cache))
    ((step, _),) = fresh._steps._parts.steps.values()
    x, tokens = mx.zeros((1, 2, 1, 128), mx.bfloat16), mx.array([[1]])

    def decode(start):
        reference = paths.override, paths.VARIABLE
        decoding = Decoding(step, cache, tokens, 256, (x, x), 0, start, (), (0, 9), *reference)
        return decoding(tokens, cache, ())

    with pytest.raises(ValueError, match=r"\[decode_step\] expected \d+ arrays but got"):
        decode(x)
    with pytest.raises(ValueError, match=r"array 1 must be float32 of shape .* but is bfloat16"):
        decode(None)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, None])
def test_embedded_rows_are_those_of_mlx(bits, dtype):
    rng = np.random.default_rng(bits)
    weight = mx.array(rng.normal(size=(37, 192)) * 3).astype(dtype)
    ids = mx.array(rng.integers(0, 37, (2, 5)), mx.uint32)
    if bits is None:
        table, expected = Weight.dense(weight), weight[ids]
    else:
        planes = mx.quantize(weight, 64, bits)
        table = Weight(planes, FORMATS[f"affine{bits}"])
        expected = mx.dequantize(*(plane[ids] for plane in planes), 64, bits)
    assert_same_bits(_ext.embed(ids, table, 192), expected)


def test_embedding_refuses_what_it_does_not_take():
    table = Weight(mx.quantize(mx.ones((4, 64)), 32, 4, mode="mxfp4"), FORMATS["mxfp4"])
    with pytest.raises(ValueError, match="table must be affine, dense or GGUF's but is mxfp4"):
        _ext.embed(mx.array([1]), table, 64)
    with pytest.raises(ValueError, match="tokens must be int32 or uint32 but are int64"):
        _ext.embed(mx.array([1], mx.int64), table, 64)
