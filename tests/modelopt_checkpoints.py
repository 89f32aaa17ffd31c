"""Tiny checkpoints of modelopt, written as its owners write them, in NumPy alone."""

import json
import re

import mlx.core as mx
import numpy as np
from conftest import DTYPES, hf_tensors, tiny_config

EXPERTS = re.compile(r"model\.layers\.[1-4]\.mlp\.experts\.[0-9]+\.(gate|up|down)_proj")
LINEAR = re.compile(r".*(_proj|_mqa|indexer\.wq_b|indexer\.wk|lm_head)")
KEPT = re.compile(r".*weights_proj")
PRODUCER = {"name": "modelopt", "version": "0.44.0"}
IGNORED = ["lm_head", "model.layers.0*", "model.layers.*.self_attn*", "model.layers.5.*"]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def every_linear(path):
    """Whether a module is a linear one, but for those of routers and indexers' weights."""
    return LINEAR.fullmatch(path) and not KEPT.fullmatch(path)


def quantization_config(**changes):
    """The entry of config.json, with every key that the exporter writes."""
    codes = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "config_groups": {
            "group_0": {"input_activations": codes, "weights": dict(codes), "targets": ["Linear"]}
        },
        "ignore": list(IGNORED),
        "quant_algo": "NVFP4",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": PRODUCER,
        "quant_method": "modelopt",
    } | changes


def declaration_file(**changes):
    """What hf_quant_config.json holds."""
    entry = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    entry |= {"exclude_modules": list(IGNORED)}
    return {"producer": PRODUCER, "quantization": entry | changes}


def e4m3(codes):
    """float32 values of bytes."""
    codes = np.asarray(codes, np.uint8)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    normal = (1 + mantissa / 8) * np.exp2(exponent.astype(np.float32) - 7)
    values = np.where(exponent == 0, mantissa / 8 * np.float32(2**-6), normal)
    return np.where(codes & 128, -values, values).astype(np.float32)


def quantized(values):
    """Codes [m, n], bytes of scales [m, n / 16] and the factor of a float32 matrix."""
    m, n = values.shape
    groups = values.reshape(m, n // 16, 16)
    factor = np.float32(np.abs(values).max() / (6 * 448))
    table = e4m3(np.arange(127))
    wanted = np.abs(groups).max(axis=-1) / 6 / factor
    scales = np.clip(np.searchsorted(table, wanted), 1, 126).astype(np.uint8)
    scaled = groups / (e4m3(scales) * factor)[..., None]
    magnitude = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(axis=-1).astype(np.uint8)
    return (magnitude | (scaled < 0) << 3).reshape(m, n).astype(np.uint8), scales, factor


def dequantized(codes, scales, factor):
    """The float32 values: an exact product, times the factor."""
    values = np.where(codes & 8, -1, 1) * E2M1[codes & 7]
    exact = values.astype(np.float32) * e4m3(scales).repeat(16, axis=1)
    return exact * np.float32(factor)


def checkpoint_tensors(config, packs=EXPERTS.fullmatch, dtype="float32", scalar=(), **options):
    """Stored tensors, and the float32 values of every tensor under its name in the release.

    ``packs(module)`` tells which modules are packed; ``scalar`` is the shape of single numbers;
    ``options`` are those of ``hf_tensors``.
    """
    stored, values = {}, {}
    for name, array in hf_tensors(config, DTYPES[dtype], **options).items():
        path = name.removesuffix(".weight")
        if not packs(path):
            stored[name], values[name] = array, np.array(array.astype(mx.float32))
            continue
        codes, scales, factor = quantized(np.array(array.astype(mx.float32)))
        words = codes[:, ::2] | codes[:, 1::2] << 4
        stored[name] = ("U8", words.shape, words.tobytes())
        stored[f"{name}_scale"] = ("F8_E4M3", scales.shape, scales.tobytes())
        stored[f"{name}_scale_2"] = ("F32", scalar, factor.tobytes())
        stored[f"{path}.input_scale"] = ("F32", scalar, np.float32(0.01).tobytes())
        values[name] = dequantized(codes, scales, factor)
    return stored, values


def config_of(beside=False, **changes):
    """A tiny config with the keys that NVIDIA's has on top; ``beside``: without the declaration."""
    config = tiny_config(num_experts=8, layer_types=["full_attention"] * 5, mlp_bias=False)
    return config if beside else config | {"quantization_config": quantization_config(**changes)}


def declare_beside(directory, **changes):
    """Write hf_quant_config.json."""
    (directory / "hf_quant_config.json").write_text(json.dumps(declaration_file(**changes)))
