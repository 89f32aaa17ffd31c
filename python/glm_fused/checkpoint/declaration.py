"""How a config declares the formats of its weights: one reader for every method that we load."""

from collections.abc import Mapping
from typing import Any

from ..formats.weights import FP8_BLOCK, Format
from ..validation import show
from . import compressed_tensors, gguf_config, modelopt
from .gguf_formats import TypedTensors
from .quantization import Declaration, Quantization, parse_format
from .safetensors_header import quoted

_KEYS = ("group_size", "bits", "mode")


def quantization_from_config(config: Mapping[str, Any]) -> Declaration | None:
    """What the config declares, or None; FP8 block scaling is checked and is no quantization here.

    Raises ValueError for unknown modes or methods and impossible sizes, naming the entry.
    """
    for key in ("quantization", "quantization_config", "hf_quant_config"):
        entry = config.get(key)
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"[config] {key} must be an object, found {show(entry)}.")
        method = entry.get("quant_method")
        if method == "fp8":
            _check_fp8(key, entry)
        elif method in ("mxfp4", "mxfp8"):
            return Quantization(parse_format(key, {"mode": method}), {})
        elif method == compressed_tensors.METHOD:
            return compressed_tensors.parse(key, entry)
        elif method == modelopt.METHOD:
            return modelopt.parse(key, entry)
        elif method == gguf_config.METHOD:
            return TypedTensors()
        elif method is not None:
            raise ValueError(
                f"[config] {key}: quant_method {show(method)}, expected compressed-tensors, fp8,"
                " modelopt, mxfp4 or mxfp8; convert the checkpoint with mlx_lm.convert."
            )
        else:
            return _parse(key, entry)
    return None


def _parse(key: str, entry: Mapping[str, Any]) -> Quantization:
    default = parse_format(key, entry)
    overrides: dict[str, Format | None] = {}
    for path, value in entry.items():
        where = f"{key}[{quoted(path)}]"
        if path in _KEYS:
            continue
        if isinstance(value, Mapping):
            overrides[path] = parse_format(where, value)
        elif type(value) is bool:
            overrides[path] = default if value else None
        elif "." in path:  # other keys are notes of the tool that wrote the config
            raise ValueError(f"[config] {where} must be an object or false, found {show(value)}.")
    return Quantization(default, overrides)


def _check_fp8(key: str, entry: Mapping[str, Any]) -> None:
    block, fmt = entry.get("weight_block_size"), entry.get("fmt", "e4m3")
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise ValueError(
            f"[config] {key}: weight_block_size {show(block)}, expected [{FP8_BLOCK}, {FP8_BLOCK}]."
        )
    if fmt != "e4m3":
        raise ValueError(f"[config] {key}: fmt {show(fmt)}, expected 'e4m3'.")
