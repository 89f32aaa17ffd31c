"""Writes tiny checkpoints of compressed-tensors, as its owners write them, in NumPy alone."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
from conftest import DTYPES, hf_tensors, tiny_config, write_safetensors

LINEAR = re.compile(r"(_proj|_mqa|indexer\.wq_b|indexer\.wk|lm_head)\.weight$")


def scheme(bits=4, group_size=64, targets=("Linear",), **weights):
    """One of ``config_groups``, with every key that the library saves."""
    return {
        "targets": list(targets),
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "group_size": group_size,
            "strategy": "group",
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        | weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def quantization_config(groups=None, ignore=("lm_head", "re:.*weights_proj"), **changes):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
        "config_groups": groups or {"group_0": scheme()},
        "ignore": list(ignore),
    } | changes


def quantized(values, bits, group_size):
    """The signed codes [m, n] and scales [m, n / group_size] of a float32 matrix."""
    m, n = values.shape
    grouped = values.reshape(m, n // group_size, group_size)
    scales = np.abs(grouped).max(axis=-1) / (2 ** (bits - 1) - 0.5)
    codes = np.rint(grouped / scales[..., None])
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).reshape(m, n), scales


def packed(codes, bits):
    """Pack codes in int32 words: code i of a word, plus half of the range, is at ``bits * i``."""
    unsigned = (codes + 2 ** (bits - 1)).astype(np.uint32).reshape(len(codes), -1, 32 // bits)
    words = np.zeros(unsigned.shape[:2], np.uint32)
    for i in range(32 // bits):
        words |= unsigned[..., i] << np.uint32(bits * i)
    return words.view(np.int32)


def checkpoint_tensors(config, form_of, dtype="float32", **options):
    """The stored tensors, and the float32 values of every tensor under its name in the release.

    ``form_of(module)`` gives (bits, group_size), or None for a module that stays as it is;
    ``options`` are those of ``hf_tensors``.
    """
    stored, values = {}, {}
    for name, array in hf_tensors(config, DTYPES[dtype], **options).items():
        path = name.removesuffix(".weight")
        form = form_of(path) if LINEAR.search(name) else None
        if form is None:
            stored[name], values[name] = array, np.array(array.astype(mx.float32))
            continue
        bits, group_size = form
        codes, scales = quantized(np.array(array.astype(mx.float32)), bits, group_size)
        scales = mx.array(scales.astype(np.float32)).astype(DTYPES[dtype])
        words = packed(codes, bits)
        stored[f"{path}.weight_packed"] = ("I32", words.shape, words.tobytes())
        stored[f"{path}.weight_scale"] = scales
        stored[f"{path}.weight_shape"] = ("I64", (2,), np.array(codes.shape, "<i8").tobytes())
        exact = np.array(scales.astype(mx.float32)).repeat(group_size, axis=1)
        values[name] = (codes * exact).astype(np.float32)
    return stored, values


def write(directory, config, stored, edit=None):
    """Write a checkpoint folder of one shard; ``edit(stored)`` may damage the tensors first."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if edit is not None:
        edit(stored)
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", stored)
    return directory


def write_dense(directory, values):
    """Write the values in the release's layout, in float32."""
    tensors = {name: mx.array(array) for name, array in values.items()}
    return write(directory, tiny_config(), tensors)
