"""Limits of token ids, of the context and of what one command may ask for."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from test_model import tiny

from glm_fused.models import tokens


@pytest.mark.parametrize("token", [-1, 96, 2**32 - 1, 2**63 - 1])
def test_a_token_outside_the_vocabulary_raises(token):
    model, message = tiny(), rf"0 to 95, the vocabulary, but \[0, 2\] is {token}"
    with pytest.raises(ValueError, match=message):
        model(mx.array([[5, 6, token, 8]], mx.int64))
    zero = mx.zeros((1, 1), mx.int64)
    logits = model(mx.array([[5, 6, token, 8]], mx.int64) + zero)  # not evaluated yet
    with pytest.raises(ValueError, match=message):
        mx.eval(logits)
    assert mx.isfinite(model(mx.array([[5, 95]]))).all()  # the stream goes on


def test_a_gpu_makes_a_token_outside_the_vocabulary_nan(monkeypatch):
    """The CPU's stream stands in for a GPU's, as it takes the same ops."""
    embedding = nn.Embedding(96, 8)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    rows = tokens.embed(embedding, mx.array([[5, 96, -1, 2**31]], mx.int64), 96)
    assert mx.isnan(rows[0]).all(axis=-1).tolist() == [False, True, True, True]
    assert mx.array_equal(rows[0, 0], embedding.weight[5])


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int16, mx.uint16, mx.uint32, mx.int64])
def test_tokens_of_any_integer_type(dtype):
    model = tiny()
    expected = model(mx.array([[7, 9, 11, 90]], mx.int32))
    assert mx.array_equal(model(mx.array([[7, 9, 11, 90]], dtype)), expected)
    spread = mx.array([[7, 0, 9, 0, 11, 0, 90]], dtype)
    assert mx.array_equal(model(spread[:, ::2]), expected)


def test_the_context_is_a_limit():
    model = tiny()
    model.model._context = 8
    kv = model.make_cache()
    model(mx.zeros((1, 6), mx.int32), kv)
    with pytest.raises(ValueError, match="6 cached and 3 new tokens, expected at most 8"):
        model(mx.zeros((1, 3), mx.int32), kv)
    model(mx.zeros((1, 2), mx.int32), kv)
    with pytest.raises(ValueError, match="0 cached and 9 new"):
        model(mx.zeros((1, 9), mx.int32))


@pytest.mark.parametrize("text", ["abc", "0", "-1", "2x", "1025", "9" * 30])
def test_a_number_of_threads_that_is_none_is_shown(text):
    run = subprocess.run(
        [sys.executable, "-c", "import glm_fused; glm_fused.num_threads()"],
        env=os.environ | {"GLM_FUSED_NUM_THREADS": text},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"NUM_THREADS must be between 1 and 1024 threads but is '{text}'." in run.stderr
