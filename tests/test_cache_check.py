"""Caches that are not the model's, or not whole, give one error each before a token is computed."""

import copy
import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    BatchKVCache,
    CacheList,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    save_prompt_cache,
    trim_prompt_cache,
)

import glm_fused
from glm_fused.checkpoint.prompt_cache import load_prompt_cache
from glm_fused.formats.kv_rows import format_of
from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model

VECTORS = Path(__file__).parent / "vectors"
TOKENS, NEXT = mx.array([[5, 6, 7, 8, 9]]), mx.array([[3]])


@pytest.fixture(scope="module")
def model():
    return glm_fused.load_model(VECTORS / "glm52")[0]


def filled(model, tokens=TOKENS, kv_format="auto"):
    model.kv_format = kv_format
    kv = model.make_cache()
    mx.eval(model(tokens, kv))
    model.kv_format = "auto"
    return kv


def latents(kv, layer):
    return kv[layer][0]


def indexer(kv, layer):
    return kv[layer][1]


def put(array, **changes):
    for name, value in changes.items():
        setattr(array, name, value)


def cast(cache, dtype):
    cache.keys, cache.values = cache.keys.astype(dtype), cache.values.astype(dtype)


def set_entry(layer, j, entry):
    layer.caches = tuple(entry if i == j else c for i, c in enumerate(layer.caches))


FAULTS = {
    "one layer is shorter": (lambda kv: latents(kv, 4).trim(1), r"layer 4, latents: .* length 4"),
    "the indexer is shorter": (lambda kv: indexer(kv, 2).trim(2), "layer 2, indexer keys: .* 3"),
    "layer 0 is shorter": (lambda kv: latents(kv, 0).trim(1), "layer 0, indexer keys: .* length 5"),
    "longer than its buffer": (
        lambda kv: [put(c, offset=999) for layer in kv for c in layer.caches],
        "room for 256 tokens, expected room for the 999",
    ),
    "negative": (lambda kv: put(latents(kv, 1), offset=-1), "layer 1, latents: found -1 tokens"),
    "a fraction": (lambda kv: put(latents(kv, 1), offset=5.0), r"found 5\.0 tokens"),
    "an array": (lambda kv: put(latents(kv, 1), offset=mx.array(5)), "found an array of"),
    "int32 keys": (lambda kv: cast(latents(kv, 3), mx.int32), "layer 3, latents: .*int32"),
    "mixed types": (lambda kv: cast(indexer(kv, 2), mx.float16), "layer 2, indexer keys:.*float16"),
    "types of one cache": (
        lambda kv: put(latents(kv, 3), values=latents(kv, 3).values.astype(mx.float16)),
        "layer 3, latents: found values mlx.core.float16",
    ),
    "packed in one layer": (
        lambda kv: cast(latents(kv, 5), mx.uint8), "layer 5, latents: found keys mlx.core.uint8"
    ),
    "narrow keys": (
        lambda kv: put(latents(kv, 6), keys=latents(kv, 6).keys[..., :-1]), "layer 6, latents: fou"
    ),
    "wide values": (
        lambda kv: put(latents(kv, 2), values=mx.zeros((1, 1, 256, 4))), "latents: found values"
    ),
    "two heads": (
        lambda kv: put(
            latents(kv, 1),
            keys=mx.repeat(latents(kv, 1).keys, 2, axis=1),
            values=mx.repeat(latents(kv, 1).values, 2, axis=1),
        ),
        "layer 1, latents: found keys",
    ),
    "another batch": (
        lambda kv: put(
            latents(kv, 1),
            keys=mx.repeat(latents(kv, 1).keys, 2, axis=0),
            values=mx.repeat(latents(kv, 1).values, 2, axis=0),
        ),
        "layer 1, latents: found batch 2, expected 1",
    ),
    "wide values of no use": (
        lambda kv: put(indexer(kv, 2), values=mx.zeros((1, 1, 256, 4))), "indexer keys: found value"
    ),
    "shorter values": (
        lambda kv: put(latents(kv, 1), values=latents(kv, 1).values[:, :, :5]), "found values"
    ),
    "no keys": (lambda kv: put(latents(kv, 1), keys=None), "layer 1, latents: found keys None"),
    "an empty layer": (lambda kv: set_entry(kv[1], 0, KVCache()), "latents: found length 0"),
    "latents for indexer keys": (
        lambda kv: set_entry(kv[2], 1, copy.copy(latents(kv, 2))), "layer 2, indexer keys: "
    ),
    "a rotating cache": (
        lambda kv: set_entry(kv[1], 0, RotatingKVCache(64)), "found a RotatingKVCache, exp"
    ),
    "a quantized cache": (
        lambda kv: set_entry(kv[1], 0, QuantizedKVCache()), "found a QuantizedKVCache, exp"
    ),
    "a cache of no length": (
        lambda kv: set_entry(kv[0], 0, ConcatenateKVCache()), "found a ConcatenateKVCache, expected"
    ),
    "no CacheList": (lambda kv: kv.__setitem__(4, KVCache()), "layer 4 is .* got KVCache of 0"),
    "None": (lambda kv: kv.__setitem__(4, None), "layer 4 is .* got NoneType of 0"),
    "a layer too few": (lambda kv: kv.pop(), r"one entry per layer \(8\), got 7"),
    "layers of another order": (lambda kv: kv.reverse(), "layer 0 is 'full' and needs a CacheList"),
}  # fmt: skip


@pytest.mark.parametrize("stepped", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_that_is_not_whole_is_refused(model, fault, stepped):
    """It is refused even between two steps of a cache that passed before."""
    kv = filled(model)
    if stepped:
        mx.eval(model(NEXT, kv))
        trim_prompt_cache(kv, 1)
    change, message = FAULTS[fault]
    change(kv)
    lengths = [c.offset for layer in kv for c in getattr(layer, "caches", ())]
    with pytest.raises(ValueError, match=message):
        model(NEXT, kv)
    after = [c.offset for layer in kv for c in getattr(layer, "caches", ())]
    assert str(after) == str(lengths)  # nothing was appended before the refusal


def test_a_batch_of_tokens_needs_a_cache_of_as_many_rows(model):
    kv = filled(model)
    with pytest.raises(ValueError, match="layer 0, latents: found batch 1, expected 2"):
        model(mx.array([[1], [2]]), kv)
    assert model(NEXT, kv).shape[0] == 1


def batch(model, padding):
    kv = [CacheList(*(BatchKVCache(padding) for _ in c.caches)) for c in model.make_cache()]
    mx.eval(model(mx.array([[1, 2, 3], [4, 5, 6]]), kv))
    return kv


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        (mx.array([0, 2]), r"layer 3, latents: found padding \[0, 2\], expected \[0, 1\]"),
        (mx.array([0]), "left_padding of 1 rows, expected 2"),
        (mx.array([0, -1]), "left_padding an array of .* an integer of at least 0"),
        (mx.array([0.0, 1.0]), "left_padding an array of .*float32"),
        (None, "left_padding None"),
    ],
)
def test_batches_of_unequal_padding_are_refused(model, padding, message):
    kv = copy.deepcopy(batch(model, [0, 1]))
    latents(kv, 3).left_padding = padding
    with pytest.raises(ValueError, match=message):
        model(mx.array([[7], [8]]), kv)
    kv = batch(model, [0, 1])
    set_entry(kv[3], 0, KVCache())
    with pytest.raises(ValueError, match="layer 3, latents: found kind KVCache"):
        model(mx.array([[7], [8]]), kv)


def test_a_cache_that_passed_one_model_is_checked_for_another(model):
    config = json.loads((VECTORS / "glm52" / "config.json").read_text())
    other = Model(args_from_config(config | {"kv_lora_rank": 64}))
    kv = filled(model)
    with pytest.raises(ValueError, match="layer 0, latents: found keys"):
        other(NEXT, kv)


def test_trimmed_and_grown_caches_pass(model):
    kv = filled(model)
    expected = np.array(model(NEXT, kv))
    trim_prompt_cache(kv, 1)
    model(mx.zeros((1, 300), mx.int32), kv)
    trim_prompt_cache(kv, 300)
    assert np.array_equal(np.array(model(NEXT, kv)), expected)
    trim_prompt_cache(kv, 6)
    mx.eval(model(TOKENS, kv))
    assert np.array_equal(np.array(model(NEXT, kv)), expected)


@pytest.mark.parametrize("kv_format", ["auto", "fp8", "int8", "fp16"])
def test_a_saved_cache_is_loaded(model, tmp_path, kv_format):
    kv, file = filled(model, kv_format=kv_format), tmp_path / "kv.safetensors"
    save_prompt_cache(str(file), kv)
    loaded = load_prompt_cache(file, model.args)
    assert np.array_equal(np.array(model(NEXT, loaded)), np.array(model(NEXT, kv)))


def rewrite(file, change):
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


BROKEN = {
    "another class": (
        lambda h: h["__metadata__"].update({"1.0": "mx"}),
        "no prompt cache that mlx",
    ),
    "no metadata": (lambda h: h.pop("__metadata__"), "no prompt cache that mlx-lm wrote"),
    "a shape": (lambda h: h["0.0.0.0"].update(shape=[9]), "holds .* bytes, expected"),
    "no header": (lambda h: h.clear(), "no tensor for the rest"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused(model, tmp_path, fault):
    file = tmp_path / "kv.safetensors"
    save_prompt_cache(str(file), filled(model))
    change, message = BROKEN[fault]
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_prompt_cache(file, model.args)


@pytest.mark.parametrize(
    ("name", "message"), [("none.safetensors", "no such file"), ("kv", "ends in .safetensors")]
)
def test_files_that_are_none(model, tmp_path, name, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_prompt_cache(tmp_path / name, model.args)


def test_formats_of_types():
    with pytest.raises(ValueError, match="int32 are in no format, expected one of"):
        format_of(mx.int32)
