"""The bundled model, at 20 times its index_topk, gives the tokens of transformers in fp32."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import glm_fused
from glm_fused.checkpoint.paths import bundled_folder

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "demo_tokens.json").read_text())


@pytest.fixture(scope="module")
def model():
    model, _ = glm_fused.load_model(bundled_folder())
    model.set_dtype(mx.float32)
    assert len(GOLDEN["prompt"]) >= 16 * model.args.index_topk
    return model


@pytest.mark.parametrize("chunk", [2048, 300])
def test_prefill_and_decode(model, chunk):
    prompt, kv = mx.array(GOLDEN["prompt"])[None], model.make_cache()
    predicted: list[int] = []
    for first in range(0, prompt.shape[1], chunk):
        logits = model(prompt[:, first : first + chunk], kv)
        predicted += mx.argmax(logits[0], axis=-1).tolist()
    assert predicted == GOLDEN["predicted"]
    continued = predicted[-1:]
    while len(continued) < len(GOLDEN["continued"]):
        logits = model(mx.array([continued[-1:]]), kv)
        continued.append(mx.argmax(logits[0, -1]).item())
    assert continued == GOLDEN["continued"]


def test_decode_from_the_first_token(model):
    kv = model.make_cache()
    for i, token in enumerate(GOLDEN["prompt"][:400]):
        logits = model(mx.array([[token]]), kv)
        assert mx.argmax(logits[0, -1]).item() == GOLDEN["predicted"][i]


def test_both_paths_agree_in_bits(model):
    tokens = mx.array(GOLDEN["prompt"][:200])[None]
    fused = np.array(model(tokens, model.make_cache()).view(mx.uint32))
    with glm_fused.reference_path():
        again = np.array(model(tokens, model.make_cache()).view(mx.uint32))
    assert np.array_equal(fused, again)
