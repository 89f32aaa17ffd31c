"""Reads a model's parameters, within their own size of memory, and checks scales on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import _ext
from ..formats.gguf_scales import block_scales
from ..formats.weights import FP8, GGUF, PLANES, Format
from ..host import to_numpy
from ..models.config import ModelArgs
from ..models.tensor_names import unused
from .folder import Checkpoint
from .progress import byte_bar
from .stored import OTHER_NAMES

_SCALE_SUFFIXES = (
    ".weight_scale_inv",
    ".kv_b_proj.scales",
    ".kv_b_proj.biases",
    ".kv_b_proj.weight_scale",
    ".kv_b_proj.weight_scale_2",
)
_MODELOPT_SUFFIXES = (".weight_scale", ".weight_scale_2")
SCALES = tuple(name for name in PLANES if name != "weight")


class Scales(NamedTuple):
    """Scales to check, and the format of the parameter; None where it has become bfloat16."""

    name: str
    array: mx.array
    format: Format | None


def hidden_scales(
    weights: Mapping[str, mx.array],
    args: ModelArgs,
    formats: Mapping[str, Format],
    only_mlx_formats: bool,
) -> list[Scales]:
    """Scales of tensors that become parameters of another form."""
    suffixes = _SCALE_SUFFIXES + (_MODELOPT_SUFFIXES if only_mlx_formats else ())
    scales = []
    for name, array in weights.items():
        module, _, leaf = name.rpartition(".")
        fmt = formats.get(module)
        if unused(name, args) is not None:
            continue
        if name.endswith(suffixes) and (only_mlx_formats or fmt != FP8):
            scales.append(Scales(name, array, fmt))
        hidden = only_mlx_formats or module.endswith(".kv_b_proj")
        if hidden and fmt in GGUF and leaf == "weight":
            scales.append(Scales(name, block_scales(array, fmt), fmt))
    return scales


def read_parameters(model: nn.Module, checkpoint: Checkpoint, sources: list[Scales]) -> None:
    """Read the model's parameters one by one, and check scales; consumes ``sources``.

    Where the CPU is to read them, they then lie in huge pages if the system lets.

    Raises RuntimeError, naming the parameter, for one that cannot be read, and ValueError, naming
    the tensor and the place in it, for a scale that is none.
    """
    formats = {name: m.format for name, m in model.named_modules() if hasattr(m, "format")}
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    total = sum(array.nbytes for _, array in parameters)
    with _lean_memory(), byte_bar("Loading", total) as bar:
        while sources:
            _read(sources[-1].name, sources[-1].array, checkpoint)
            _check_scales(sources.pop(), checkpoint)
        for name, array in parameters:
            _read(name, array, checkpoint)
            if mx.default_device() == mx.cpu:
                _ext.move_to_huge_pages(array)
            module, _, leaf = name.rpartition(".")
            fmt = formats.get(module)
            if leaf in SCALES:
                _check_scales(Scales(name, array, fmt), checkpoint)
            elif fmt in GGUF and leaf == "weight":
                _check_scales(Scales(name, block_scales(array, fmt), fmt), checkpoint)
            bar.update(array.nbytes)


def _read(name: str, array: mx.array, checkpoint: Checkpoint) -> None:
    """Read a lazy array; the error of a failing disk says which."""
    try:
        mx.eval(array)
    except RuntimeError as error:
        raise RuntimeError(f"[loader] {checkpoint.path}: {name}: {error}") from None


def _check_scales(scales: Scales, checkpoint: Checkpoint) -> None:
    """Raise ValueError if a scale is NaN, infinite or, for FP8, not positive."""
    name, array, fmt = scales
    if array.dtype == mx.uint8:
        # e8m0 has one NaN; e4m3, of nvfp4, has one for each sign.
        e4m3 = fmt is not None and fmt.mode == "nvfp4"
        bad, expected = (array & 0x7F) == 0x7F if e4m3 else array == 0xFF, "no NaN"
    elif fmt == FP8 or name.endswith("_scale_inv"):
        bad, expected = ~((array > 0) & mx.isfinite(array)), "positive finite numbers"
    else:
        bad, expected = ~mx.isfinite(array), "finite numbers"
    if not bad.any().item():
        return
    index = np.argwhere(to_numpy(bad))[0].tolist()
    value = array[tuple(index)].item()
    if name not in checkpoint.tensors:
        name, index = _stored_name(name, index, checkpoint)
    of_block = "a block's scale " if fmt in GGUF else ""
    raise ValueError(f"[loader] {name} has {of_block}{value} at {index}, expected {expected}.")


def _stored_name(name: str, index: list[int], checkpoint: Checkpoint) -> tuple[str, list[int]]:
    """The tensor, and where in it, that one of a parameter's numbers was read from."""
    expert, rest = name, index
    if ".switch_mlp." in name:
        expert, rest = name.replace(".switch_mlp.", f".experts.{index[0]}."), index[1:]
    module, _, leaf = expert.rpartition(".")
    others = (f"{module}.{other}" for other in OTHER_NAMES.get(leaf, ()))
    for stored in (expert, *others):
        if stored in checkpoint.tensors:
            return stored, rest
    return name, index


@contextmanager
def _lean_memory() -> Iterator[None]:
    """No cache of freed buffers, and no reading ahead of what consumes the data."""
    mx.synchronize()
    cache = mx.set_cache_limit(0)
    # Above its limit MLX waits for the tasks that it counts, for ever if one of them is over.
    limit = mx.set_memory_limit(1) if _ext.active_tasks() == 0 else None
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        if limit is not None:
            mx.set_memory_limit(limit)
