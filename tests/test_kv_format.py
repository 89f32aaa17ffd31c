"""The cache's formats: bytes, packing, growth, and the model on each of them."""

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache, trim_prompt_cache

import glm_fused
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.formats.kv_rows import FLOATS, KV_FORMATS, PACKED, pack, row_bytes, unpack
from glm_fused.models.cache import append, bytes_per_token
from glm_fused.models.config import ModelArgs

VECTORS = Path(__file__).parent / "vectors"
# The logits' mean error, as a part of their standard deviation, while every key is selected. The
# golden model's large random weights magnify it: bf16 keeps 8 bits of a value, e4m3 4, int8 7.
TOLERANCE = {"auto": 1e-5, "fp32": 1e-5, "fp16": 2e-3, "bf16": 0.1, "fp8": 0.4, "int8": 0.2}
GLM_52 = {"indexer_types": ["full" if i < 3 or i % 4 == 2 else "shared" for i in range(78)]}


def random(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(scale * rng.standard_normal(shape, dtype=np.float32))


def test_bytes_per_token_of_glm():
    args = ModelArgs(**GLM_52)
    assert bytes_per_token(args) == 95_232
    assert bytes_per_token(ModelArgs()) == 109_824
    assert row_bytes("fp8", 512, 64) == 656
    assert bytes_per_token(args, "fp8") == 78 * 656 + 21 * 132
    assert bytes_per_token(args, "int8") == 78 * 644 + 21 * 132


@pytest.mark.parametrize("rank", [512, 100, 1, 129])
def test_fp8_rows_are_laid_out_as_flashmla(rank):
    values, rope = random((3, rank), scale=5.0), random((3, 64), 1)
    rows = np.array(pack(values, rope, "fp8"))
    tiles = -(-rank // 128)
    assert rows.shape == (3, rank + 4 * tiles + 128)
    scales = np.ascontiguousarray(rows[:, rank : rank + 4 * tiles]).view(np.float32)
    padded = np.pad(np.abs(np.array(values)), [(0, 0), (0, tiles * 128 - rank)])
    np.testing.assert_allclose(scales, padded.reshape(3, tiles, 128).max(-1) / 448, rtol=1e-6)
    tail = np.ascontiguousarray(rows[:, rank + 4 * tiles :]).view(np.uint16)
    assert np.array_equal(tail, np.array(rope.astype(mx.bfloat16).view(mx.uint16)))


@pytest.mark.parametrize(("kv_format", "steps"), [("fp8", 16), ("int8", 127)])
def test_packed_values_are_the_nearest(kv_format, steps):
    values = random((40, 200), 2) * mx.exp(3 * random((40, 1), 3))
    values[0] = 0
    found, rope = unpack(pack(values, None, kv_format), 200)
    assert rope.shape == (40, 0)
    assert not found[0].any().item()
    tile = 128 if kv_format == "fp8" else 200
    for first in range(0, 200, tile):
        x, y = (np.array(a[1:, first : first + tile]) for a in (values, found))
        largest = np.abs(x).max(axis=-1, keepdims=True)
        # The error is at most half a step, of the value itself for e4m3, of the largest for int8.
        step = np.maximum(np.abs(x), largest * 2.0**-14) if kv_format == "fp8" else largest
        assert (np.abs(x - y) <= 1.001 * step / steps / (1 if kv_format == "fp8" else 2)).all()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_model_on_each_format(kv_format):
    model, tokens, expected = golden()
    model.kv_format = kv_format
    kv = model.make_cache()
    # The same values are cached one token at a time and as a whole, with and without a cache.
    logits = [model(tokens[:, :60], kv)] + [model(tokens[:, i : i + 1], kv) for i in range(60, 90)]
    logits = np.array(mx.concatenate(logits, axis=1))
    whole = np.array(model(tokens[:, :90]))
    assert np.abs(whole - logits).max() <= 0.05 * logits.std()
    dense = np.s_[:, : model.args.index_topk]
    assert np.abs(logits[dense] - expected[dense]).mean() <= TOLERANCE[kv_format] * expected.std()
    dtype = (FLOATS | PACKED).get(kv_format, mx.float32)
    assert {cache.keys.dtype for layer in kv for cache in layer.caches} == {dtype}
    name = "fp32" if kv_format == "auto" else kv_format
    assert sum(layer.nbytes for layer in kv) == 256 * bytes_per_token(model.args, name)


def golden():
    model, _ = glm_fused.load_model(VECTORS / "glm52")
    model.set_dtype(mx.float32)
    expected = mx.load(str(VECTORS / "glm52" / "expected.safetensors"))
    return model, expected["tokens"], np.array(expected["logits"])


@pytest.mark.parametrize("kv_format", ["fp8", "int8"])
def test_a_packed_cache_is_trimmed_and_saved(kv_format, tmp_path):
    model, tokens, _ = golden()
    model.kv_format = kv_format
    kv = model.make_cache()
    model(tokens[:, :70], kv)
    expected = np.array(model(tokens[:, 70:71], kv))
    trim_prompt_cache(kv, 1)
    model(92 - tokens[:, 70:80], kv)
    trim_prompt_cache(kv, 10)
    save_prompt_cache(str(tmp_path / "kv.safetensors"), kv)
    kv = load_prompt_cache(str(tmp_path / "kv.safetensors"))
    model.kv_format = "auto"  # a cache keeps its own format
    assert np.array_equal(np.array(model(tokens[:, 70:71], kv)), expected)
    assert kv[0][0].keys.dtype == PACKED[kv_format]


def test_a_growing_cache_is_seldom_copied():
    cache, buffers = KVCache(), []
    row = mx.zeros((1, 1, 64, 4))
    for _ in range(1500):
        append(cache, row, row[..., :2], "auto")
        buffers.append(cache.keys.shape[2])
    assert buffers[-1] <= 1500 * 64 * 1.13
    copied = [a for a, b in pairwise(buffers) if a != b]
    assert sum(copied) <= 9 * 1500 * 64


def test_unknown_format():
    with pytest.raises(ValueError, match=r"one of auto, bf16, .* got 'fp4'"):
        glm_fused.load_model(VECTORS / "glm52", kv_format="fp4")
    model, _ = glm_fused.load_model(VECTORS / "glm52", kv_format="int8")
    assert model.kv_format == "int8"
    with pytest.raises(ValueError, match="got None"):
        model.kv_format = None


@pytest.mark.parametrize("kv_format", ["auto", *PACKED])
def test_decoding_does_not_copy_the_cache(kv_format):
    """It decodes as mlx-lm does, which starts the next step before the last one is done."""
    model, _ = glm_fused.load_model(bundled_folder(), kv_format=kv_format)
    model.model._context = 50_000
    kv = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3]]), kv))
    for cache in (cache for layer in kv for cache in layer.caches):
        room = [(0, 0), (0, 0), (0, 40_000), (0, 0)]
        cache.keys, cache.values = mx.pad(cache.keys, room), mx.pad(cache.values, room)
        cache.offset = 40_000
        mx.eval(cache.keys, cache.values)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in generate_step(mx.array([5]), model, max_tokens=8, prompt_cache=kv):
        pass
    assert mx.get_peak_memory() - before <= kv[0][0].nbytes / 10
