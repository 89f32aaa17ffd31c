"""Whole tokens on Metal are the CPU's, bit for bit: from the embedding to the logits."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from metal_backend import GPU, cpu, metal, simulated_only
from sim.host import compiled

from glm_fused import ops
from glm_fused.loader import load_model
from glm_fused.ops import metal_sim
from glm_fused.streaming.options import StreamOptions

TOPK = 16
LENGTH = TOPK + 64
PROMPT = mx.array([[3, 5, 7, 9, 11, 200, 31, 44, 50, 61]])
STREAM = StreamOptions(budget=8 << 30, slots=4, patience=30.0)
AFFINE = {"group_size": 32, "bits": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense layer and sparse ones, full and shared, in bfloat16 and four bits."""
    path = tmp_path_factory.mktemp("whole")
    write_checkpoint(path, tiny_config(index_topk=TOPK), quantization=AFFINE, shards=2)
    return path


def decode(model, length):
    """The bits of the logits of greedy tokens, built ahead as mlx-lm does, up to a length."""
    cache = model.make_cache()
    logits = [model(PROMPT, cache)[:, -1:]]
    while cache[0][0].size() < length:
        logits.append(model(mx.argmax(logits[-1], axis=-1), cache))
        mx.async_eval(logits[-1])
    return [np.array(step.view(mx.uint16)) for step in logits]


def first_difference(folder, stream, kv_format="auto", length=LENGTH, **settings):
    """The first token of `length` that differs between Metal, with settings, and the CPU."""
    with cpu():
        expected = decode(load_model(folder, kv_format=kv_format)[0], length)
    model, _ = load_model(folder, kv_format=kv_format, stream=stream)
    with metal(**settings):
        found = decode(model, length)
    assert GPU or len(metal_sim.take_launches()) > 40 * len(expected)
    assert stream is None or model.streaming.stats()["misses"] > 0
    pairs = zip(found, expected, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if not np.array_equal(a, b)), None)


@pytest.mark.parametrize(
    ("kv_format", "stream"),
    [
        pytest.param("auto", None, id="auto-resident"),
        pytest.param("int8", STREAM, id="int8-streamed"),
        pytest.param("fp8", None, id="fp8-resident", marks=pytest.mark.slow),
        pytest.param("auto", STREAM, id="auto-streamed", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_the_cpus(folder, stream, kv_format):
    """64 of them past `index_topk`, from where on the indexer leaves keys out."""
    assert first_difference(folder, stream, kv_format) is None


EITHER = [
    pytest.param(None, id="resident", marks=pytest.mark.slow),
    pytest.param(STREAM, id="streamed"),
]


@simulated_only
@pytest.mark.parametrize("stream", EITHER)
def test_a_rounding_that_is_moved_is_caught(folder, stream):
    """The control: a norm that does not round before it multiplies by the weight."""
    old, moved = "product(round_to(x * inverse, type), weight)", []

    def compiler(name, text):
        moved.append(old in text)
        return compiled(name, text.replace(old, "product(x * inverse, weight)"), True, False)

    assert first_difference(folder, stream, length=TOPK, compiler=compiler) is not None
    assert any(moved)


@pytest.mark.parametrize("stream", EITHER)
def test_an_index_that_is_off_is_caught(folder, stream, monkeypatch):
    """The control: a key that the indexer has selected is taken for the next one."""
    topk = ops.indexer_topk

    def off_by_one(*args, **kwargs):
        selected = topk(*args, **kwargs)
        on_metal = metal_sim.active() or mx.default_device() == mx.gpu
        return selected + (mx.arange(TOPK) == TOPK // 2) if on_metal else selected

    monkeypatch.setattr(ops, "indexer_topk", off_by_one)
    found = first_difference(folder, stream, length=TOPK + 8)
    assert found is not None and found > TOPK - PROMPT.shape[1]
