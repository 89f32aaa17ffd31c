"""Writes the model of a checkpoint's folder as a GGUF file, as llama.cpp's converter would."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import _ext
from ..checkpoint.checked import has_whole_mtp
from ..checkpoint.folder import Checkpoint
from ..checkpoint.gguf_config import config_from_gguf
from ..checkpoint.gguf_formats import type_of
from ..checkpoint.gguf_metadata import metadata_of
from ..checkpoint.gguf_names import gguf_name, model_name
from ..checkpoint.gguf_writer import NewTensor, shard_path, write_shards
from ..checkpoint.layer_contents import mtp_layers
from ..checkpoint.progress import byte_bar
from ..checkpoint.safetensors_header import TensorInfo
from ..checkpoint.writing import check_space
from ..formats.weights import (
    DENSE_FORMATS,
    FORMATS,
    Format,
    Weight,
    dense_format,
    dequantize,
    plane_names,
)
from ..generation.gguf_vocabulary import vocabulary_of
from ..host import to_numpy
from ..loader import open_model
from ..models.config import ModelArgs, args_from_config
from ..models.decoder import Model
from ..models.tensors import Module, modules
from ..validation import show
from .target import Types, check_place, check_rows

# The types that weights may have: floats, and blocks that the package gguf quantizes to.
TYPES = (*(fmt.name for fmt in DENSE_FORMATS.values()), "q8_0", "q5_0", "q4_0", "ggml-mxfp4")
_FP32, _BF16 = FORMATS["fp32"], FORMATS["bf16"]
# Keys that are resolved to others, or that no part of the model that is written reads.
_NOT_COMPARED = (
    "first_k_dense_replace", "moe_layer_freq", "index_topk_pattern", "index_topk_freq",
    "index_skip_topk_offset", "rope_parameters", "rope_theta", "rope_scaling",
    "num_key_value_heads", "num_nextn_predict_layers", "mtp_layers", "has_mtp",
    "index_share_for_mtp_iteration",  # it changes which drafts are made, and no token
)  # fmt: skip


Quantize = Callable[[NDArray[np.float32], Format], bytes]


class _Planned(NamedTuple):
    """A tensor to write: the module that has it, its format, and its name there if not weight."""

    module: Module
    format: Format
    bias: str | None = None


def to_gguf(
    model: str | os.PathLike[str],
    out: Path,
    types: Types,
    overwrite: bool = False,
    shard_size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write the model that ``model`` names to the file ``out``; returns the files.

    With ``shard_size`` they are shards of about so many bytes, named after it.

    Routers and norms are float32, and what ``types`` leave is floats as it is; what is packed is
    made floats first. The MTP layer is kept if it is whole. Files have their names once all are
    whole. ``say`` is told what they lack.

    Raises FileExistsError where a file exists, unless ``overwrite``, ValueError for a model that
    is GGUF already, for what GGUF cannot say, for rows that blocks do not divide and for values
    that are no finite numbers of a type, ImportError without the package gguf where types need it,
    and whatever loading raises.
    """
    checkpoint = Checkpoint.open(model)
    if checkpoint.metadata is not None:
        raise ValueError(f"[convert] {checkpoint.path} is a GGUF file, expected a folder.")
    check_place(out, checkpoint.path)
    loaded = open_model(checkpoint.path, "auto", None, mtp=has_whole_mtp(checkpoint)).model
    args = loaded.args
    planned = dict(_plan(loaded, types))
    quantize = None
    if any(p.format.mode != "dense" for p in planned.values()):
        quantize = _quantizer()
    tensors = [NewTensor(name, type_of(p.format), _shape(p)) for name, p in planned.items()]
    shards = list(_shards(tensors, shard_size))
    for path in (shard_path(out, i, len(shards)) for i in range(len(shards))):
        if path.exists() and not overwrite:
            raise FileExistsError(f"[convert] {path} exists; --overwrite replaces it.")
    keys = _keys(checkpoint, args, tensors, say)
    for layer in mtp_layers(args, checkpoint.tensors):
        say(f"layer {layer.layer}, which is for MTP, is left out")
    needed = sum(tensor.nbytes for tensor in tensors)
    check_space(out.parent, needed)
    with byte_bar("Converting", needed) as bar:
        return write_shards(out, keys, shards, _Contents(loaded, planned, quantize, bar))


def _shards(tensors: list[NewTensor], size: int | None) -> Iterator[list[NewTensor]]:
    """The tensors of each shard: those that fit in ``size`` bytes, or a larger one alone."""
    shard: list[NewTensor] = []
    for tensor in tensors:
        if shard and size is not None and sum(t.nbytes for t in (*shard, tensor)) > size:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _plan(model: Model, types: Types) -> Iterator[tuple[str, _Planned]]:
    """GGUF's names of the tensors, each with where it comes from."""
    layers = dict(model.named_modules())
    for module in modules(model.args):
        fmt = types.of(module) or _floats(layers[module.path])
        if not module.quantizable:
            fmt = _FP32
        name = gguf_name(f"{module.path}.weight")
        check_rows(name, module.shape[-1], type_of(fmt).columns, fmt)
        yield name, _Planned(module, fmt)
        if module.bias is not None:
            bias = module.bias[0]
            yield gguf_name(f"{module.path}.{bias}"), _Planned(module, _FP32, bias)


def _floats(layer: nn.Module) -> Format:
    """The format of a layer's weight, or bfloat16 where it is packed."""
    return _BF16 if "scales" in layer else dense_format(layer.weight.dtype)


def _shape(planned: _Planned) -> tuple[int, ...]:
    bias = planned.module.bias
    return planned.module.shape if planned.bias is None or bias is None else (bias[1],)


def _keys(
    checkpoint: Checkpoint,
    args: ModelArgs,
    tensors: list[NewTensor],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The metadata; raises ValueError where they would be read as another model's."""
    eos = checkpoint.config.get("eos_token_id")
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    keys = metadata_of(args, checkpoint.path.resolve().name, stops)
    infos = {model_name(t.name): TensorInfo("", t.type.name, t.shape, 0, 0) for t in tensors}
    told = args_from_config(config_from_gguf(checkpoint.path, keys, infos))
    for name, mine, its in _values(args, told):
        if mine != its:
            raise ValueError(
                f"[convert] {checkpoint.path}: {name} is {show(mine)}, which GGUF cannot say: it"
                f" would be read as {show(its)}."
            )
    return keys | vocabulary_of(checkpoint.path, args.vocab_size, say)


def _values(a: ModelArgs, b: ModelArgs) -> Iterator[tuple[str, Any, Any]]:
    """What two models' args have to have alike, by the names of their keys."""
    for field in fields(a):
        if field.name == "rope":
            for part in fields(a.rope):
                yield f"rope_parameters.{part.name}", *(getattr(x.rope, part.name) for x in (a, b))
        elif field.name not in _NOT_COMPARED:
            mine, its = (getattr(x, field.name) for x in (a, b))
            yield field.name, 0 if mine is None else mine, 0 if its is None else its


def _quantizer() -> Quantize:
    """The quantizers of the package gguf."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ImportError(
            "blocks need the package gguf: pip install 'glm-fused[convert]'."
        ) from None

    def quantize(values: NDArray[np.float32], fmt: Format) -> bytes:
        kind = GGMLQuantizationType[type_of(fmt).name]
        rows = np.array_split(values, min(_ext.num_threads(), len(values)))
        with ThreadPoolExecutor(len(rows)) as pool:  # NumPy lets other threads run meanwhile
            parts = pool.map(lambda part: quants.quantize(part, kind).tobytes(), rows)
            return b"".join(parts)

    return quantize


class _Contents:
    """Gives the bytes of each tensor, a matrix at a time, and lets go of what it has given."""

    def __init__(
        self,
        model: Model,
        planned: Mapping[str, _Planned],
        quantize: Quantize | None,
        bar: tqdm[Any],
    ):
        self._layers = dict(model.named_modules())
        self._planned, self._quantize, self._bar = planned, quantize, bar

    def __call__(self, tensor: NewTensor) -> Iterator[bytes]:
        module, fmt, bias = self._planned[tensor.name]
        layer = self._layers[module.path]
        for values in self._values(layer, bias):
            piece = self._encoded(tensor.name, values, fmt)
            self._bar.update(len(piece))
            yield piece
        for name in plane_names(layer.format) if "scales" in layer else [bias or "weight"]:
            del layer[name]

    def _values(self, layer: nn.Module, bias: str | None) -> Iterator[mx.array]:
        """Matrices, as floats of the layer's type or, where it is packed, in float32."""
        if bias is not None:
            yield layer[bias]
            return
        packed = "scales" in layer
        planes = layer.as_weight().planes if packed else [layer.weight]
        stacked = planes[0].ndim == 3
        for i in range(len(planes[0]) if stacked else 1):
            parts = [plane[i] for plane in planes] if stacked else planes
            yield dequantize(Weight(parts, layer.format), mx.float32) if packed else parts[0]

    def _encoded(self, name: str, values: mx.array, fmt: Format) -> bytes:
        if fmt.mode == "dense":
            values = values.astype(fmt.planes[0].dtypes[0])
        if not mx.isfinite(values).all().item():
            raise ValueError(f"[convert] {name} has a value that is no finite number as {fmt}.")
        if fmt.mode == "dense":
            bits = {2: mx.uint16, 4: mx.uint32}[values.dtype.size]
            return to_numpy(mx.contiguous(values).view(bits)).tobytes()
        assert self._quantize is not None  # some tensor is quantized
        return self._quantize(to_numpy(values.astype(mx.float32)), fmt)
