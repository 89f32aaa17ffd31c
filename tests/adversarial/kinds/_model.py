"""A tiny checkpoint of two layers with a tokenizer, and what it answers when nothing is wrong."""

import json
import os
import struct
import warnings
from functools import cache

import mlx.core as mx
from conftest import tiny_config, write_checkpoint
from test_generate import write_tokenizer

from glm_fused import reference_path
from glm_fused.loader import load_model

TOKENS = [3, 1, 4, 1, 5]


def config(**changes):
    """A config of two quantized layers, one of which has experts."""
    return tiny_config(
        num_hidden_layers=2,
        indexer_types=["full", "shared"],
        index_topk_freq=None,
        index_skip_topk_offset=None,
        **changes,
    )


def write(folder, shards=1, **changes):
    """Write the checkpoint, with a tokenizer whose token i is the word ``wi``."""
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"group_size": 64, "bits": 4}
    write_checkpoint(folder, config(**changes), quantization=quantization, shards=shards)
    write_tokenizer(folder)
    return folder


def clone(source, target, *but):
    """Make a folder of links to everything in `source` except the files named."""
    target.mkdir(exist_ok=True)
    for file in target.iterdir():
        file.unlink()
    for file in source.iterdir():
        if file.name not in but:
            os.symlink(file, target / file.name)
    return target


def header_of(content):
    """The header of a safetensors file as JSON, and the data after it."""
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:size]), content[size:]


def logits(model):
    """The logits of a short prompt and one token more, as bits."""
    kv = model.make_cache()
    parts = [model(mx.array([TOKENS]), kv), model(mx.array([[9]]), kv)]
    x = mx.concatenate([p.reshape(-1) for p in parts])
    return x.view(mx.uint32 if x.dtype == mx.float32 else mx.uint16).tolist()


def both_paths(folder):
    """The logits of the checkpoint in `folder` on both paths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = load_model(folder)
    with reference_path():
        reference = logits(model)
    return logits(model), reference


@cache
def expected(folder):
    """The logits of the checkpoint in a folder that nothing happens to, computed once."""
    return both_paths(folder)[0]
