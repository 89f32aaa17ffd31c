"""A slice of GLM-5.2: some of its layers, with random weights that several formats hold exactly.

A weight is a code from -7 to 7 times a power of two, the same for a whole tensor. MLX's affine4,
llama.cpp's Q4_0, bfloat16 and float16 then have the same values, and models in these formats differ
in their arithmetic alone.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

FORMATS = ("affine4", "bf16")
GROUP = 64  # affine4's
ZERO = 8  # the nibble of code 0
_BYTES = np.arange(256, dtype=np.uint8)
# Nibble 0, which would be -8 and make the mean of all weights differ from 0, becomes code 0.
_SYMMETRIC = np.where(_BYTES & 15, _BYTES, _BYTES | ZERO)
_SYMMETRIC = np.where(_BYTES >> 4, _SYMMETRIC, _SYMMETRIC | ZERO << 4)


class Slice(NamedTuple):
    """A dense layer that is full, then sparse ones that share its selection: most of GLM-5.2."""

    layers: int = 4
    experts: int = 64
    vocabulary: int = 154880

    def config(self) -> dict[str, Any]:
        config = json.loads(Path(__file__).with_suffix(".json").read_text())
        kinds = ["full"] + ["shared"] * (self.layers - 1)
        return config | {
            "num_hidden_layers": self.layers,
            "indexer_types": kinds,
            "n_routed_experts": self.experts,
            "vocab_size": self.vocabulary,
        }

    def arguments(self) -> list[str]:
        """The options that stand for it."""
        return [f"--{name}={value}" for name, value in self._asdict().items()]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a slice; `chosen` reads them."""
    usual = Slice()
    parser.add_argument("--layers", type=int, default=usual.layers, help="of the slice")
    parser.add_argument("--experts", type=int, default=usual.experts, help="of its sparse layers")
    parser.add_argument("--vocabulary", type=int, default=usual.vocabulary, help="its tokens")


def chosen(options: argparse.Namespace) -> Slice:
    return Slice(options.layers, options.experts, options.vocabulary)


def packed_codes(path: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The codes of a module's weight as nibbles [..., k / 2], the even columns' in the low bits."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    random = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    return np.take(_SYMMETRIC, random)


def scale(shape: tuple[int, ...]) -> float:
    """The power of two that makes products with values near 1 come near 1."""
    return 2.0 ** round(np.log2(shape[-1] ** -0.5 / 4.2))


def router(path: str, shape: tuple[int, ...]) -> mx.array:
    """A router's weight, of normal values in bfloat16; zeros would have all tokens choose alike."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    values = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
    return mx.array(values).astype(mx.bfloat16)


def codes_of(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The nibbles [..., k], one a byte, of `packed_codes`."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def floats(path: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A module's weight in floats."""
    codes = codes_of(packed_codes(path, shape))
    values = (mx.array(codes).astype(dtype) - ZERO) * scale(shape)
    mx.eval(values)
    return values


def affine4(path: str, shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """A module's weight as MLX packs it: codes, and scales and biases in a dtype."""
    codes = mx.array(packed_codes(path, shape).view(np.uint32))
    scales = mx.full((*shape[:-1], shape[-1] // GROUP), scale(shape), dtype)
    return codes, scales, -ZERO * scales


def model(of: Slice, form: str, dtype: mx.Dtype = mx.bfloat16) -> Any:
    """The slice with weights in one of FORMATS, but for indexer and router; the rest in a dtype."""
    from glm_fused.formats.weights import FORMATS as FORMATS_OF_WEIGHTS
    from glm_fused.formats.weights import Weight
    from glm_fused.models.config import args_from_config
    from glm_fused.models.decoder import Model

    made = Model(args_from_config(of.config()))
    made.set_dtype(dtype)
    quantizes, changed = made.quant_predicate, []
    for path, module, shape in _weights(made):
        if form == "affine4" and hasattr(module, "to_quantized") and quantizes(path, module):
            weight = Weight(affine4(path, shape, dtype), FORMATS_OF_WEIGHTS["affine4"])
            changed.append((path, module.packed_class(weight, module)))
        elif path.endswith(".gate"):
            module.weight = router(path, shape)
        else:
            module.weight = floats(path, shape, dtype)
    made.update_modules(tree_unflatten(changed))
    made.eval()
    mx.eval(made.parameters())
    return made


def write(of: Slice, form: str, folder: Path) -> None:
    """Write `model` as a checkpoint, without a tokenizer, into a folder that is there."""
    made, config = model(of, form), of.config()
    if form == "affine4":
        config["quantization"] = {"group_size": GROUP, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(tree_flatten(made.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


def _weights(made: Any) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """The modules that have matrices, by path, with their shapes."""
    for path, module in made.named_modules():
        if "weight" in module and module.weight.ndim > 1:
            yield path, module, module.weight.shape
