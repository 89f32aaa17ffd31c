"""Loads a checkpoint: strict, checked before any data is read, within its own size of memory."""

import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from . import _ext
from .checkpoint.compressed_tensors import METHOD, check_stored_shapes
from .checkpoint.declaration import quantization_from_config
from .checkpoint.folder import Checkpoint
from .checkpoint.inventory import check_tensors
from .formats.kv_rows import check_kv_format
from .formats.weights import Format
from .generation.options import checkpoint_options
from .generation.tokenizer import load_tokenizer
from .host import to_numpy
from .models.config import ModelArgs, args_from_config
from .models.decoder import Model
from .models.packed_integers import to_affine
from .models.tensor_names import is_expert, unused
from .streaming.banks import StreamOptions, attach_banks, find_source, plan_streaming
from .validation import show

_SCALE_SUFFIXES = (
    ".weight_scale_inv",
    ".kv_b_proj.scales",
    ".kv_b_proj.biases",
    ".kv_b_proj.weight_scale",
)


class _Scales(NamedTuple):
    """Scales to check, and the format that they belong to; None for those of FP8 blocks."""

    name: str
    array: mx.array
    format: Format | None


def load_model(
    path: str | os.PathLike[str],
    lazy: bool = False,
    kv_format: str = "auto",
    stream: StreamOptions | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Load the model in the folder ``path``; returns it and its config.

    The config of a checkpoint of compressed-tensors comes as MLX would write it of the model.

    ``path`` "demo" is the bundled model where there is no folder of that name. ``kv_format`` is how
    the model's caches store keys, one of `glm_fused.formats.kv_rows`. With ``stream``, routed
    experts are read as they are needed; ``model.streaming`` has the plan and counters, and scales
    of experts are not checked for NaN.

    Raises FileNotFoundError for missing files and ValueError for anything that does not fit, naming
    file and tensor with what was found and expected, and RuntimeError, naming the parameter, for
    one that cannot be read. With ``lazy`` parameters are read when they are first used, and scales
    are not checked for NaN; one that could not be read then is undefined, so load the model anew.
    """
    model, checkpoint, sources = _build(path, kv_format, stream)
    if not lazy:
        _materialize(model, checkpoint, sources)
    return model, _config_as_loaded(checkpoint.config, model)


def load(
    path: str | os.PathLike[str], kv_format: str = "auto", stream: StreamOptions | None = None
) -> tuple[Model, TokenizerWrapper]:
    """Load model and tokenizer; arguments and errors are those of ``load_model``."""
    model, checkpoint, sources = _build(path, kv_format, stream)
    tokenizer = load_tokenizer(checkpoint)
    _materialize(model, checkpoint, sources)
    return model, tokenizer


def _build(
    path: str | os.PathLike[str], kv_format: str, stream: StreamOptions | None
) -> tuple[Model, Checkpoint, list[_Scales]]:
    """The model over lazy weights, and those scales that no parameter of it will show."""
    check_kv_format(kv_format)
    checkpoint = Checkpoint.open(path)
    args = args_from_config(checkpoint.config)
    _check_stop_tokens(checkpoint, args)
    quantization = quantization_from_config(checkpoint.config)
    manifest = check_tensors(args, quantization, checkpoint.tensors)
    packed, formats = manifest.packed, manifest.formats
    if stream is not None:
        source = find_source(checkpoint, args, stream.sidecar)
        plan = plan_streaming(manifest, args, source, stream, kv_format)
    check_stored_shapes(checkpoint, {path: shape for path, (_, shape) in packed.items()})
    weights = _read_lazily(checkpoint)
    model = Model(args)
    model.kv_format = kv_format
    model.options = checkpoint_options(checkpoint.path)
    if stream is not None:
        _allow_open_files(len(checkpoint.files) + len(source.files))
        model.streaming = attach_banks(model, args, source, plan, stream, formats)
        mx.set_cache_limit(plan.shares.staging)
        weights = {name: array for name, array in weights.items() if not is_expert(name)}
    sources = []
    for name, array in weights.items():
        if name.endswith(_SCALE_SUFFIXES) and unused(name, args) is None:
            sources.append(_Scales(name, array, formats.get(name.rpartition(".")[0])))
    to_affine(weights, {path: fmt for path, (fmt, _) in packed.items()}, args)
    weights = model.sanitize(weights, formats)
    _pack_modules(model, weights, formats)
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    return model, checkpoint, sources


def _config_as_loaded(config: dict[str, Any], model: Model) -> dict[str, Any]:
    """The config with which the model's parameters, once saved, are a checkpoint."""
    declared = config.get("quantization_config")
    if not isinstance(declared, dict) or declared.get("quant_method") != METHOD:
        return config
    formats = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in model.named_modules()
        if "scales" in module
    }
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    if not formats:
        return rest
    usual = max(formats.values(), key=list(formats.values()).count)
    others = {path: entry for path, entry in formats.items() if entry != usual}
    return rest | {"quantization": usual | others}


def _check_stop_tokens(checkpoint: Checkpoint, args: ModelArgs) -> None:
    """A text would never end at a token that the model cannot choose."""
    found = checkpoint.config.get("eos_token_id")
    for token in found if isinstance(found, list) else [found]:
        if token is not None and token >= args.vocab_size:
            raise ValueError(
                f"[loader] {checkpoint.path}: eos_token_id {show(token)}, expected 0 to"
                f" {args.vocab_size - 1}, as vocab_size says."
            )


def _read_lazily(checkpoint: Checkpoint) -> dict[str, mx.array]:
    _allow_open_files(len(checkpoint.files))
    weights: dict[str, mx.array] = {}
    for file in checkpoint.files:
        try:
            weights |= cast(dict[str, mx.array], mx.load(str(checkpoint.path / file)))
        except RuntimeError as error:
            raise ValueError(f"[loader] {checkpoint.path / file}: {error}") from None
    return weights


def _allow_open_files(count: int) -> None:
    """Lazy arrays keep their file open, and macOS allows 256 files unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _pack_modules(
    model: Model, weights: Mapping[str, mx.array], formats: Mapping[str, Format]
) -> None:
    """Replace each module that has scales by its packed form, still to be filled."""
    packed = [
        (path, module.unfilled(formats[path]))
        for path, module in model.named_modules()
        if f"{path}.scales" in weights
    ]
    if packed:
        model.update_modules(tree_unflatten(packed))


def _materialize(model: Model, checkpoint: Checkpoint, sources: list[_Scales]) -> None:
    """Read the parameters one by one and check scales; consumes ``sources``."""
    formats = {name: m.format for name, m in model.named_modules() if "scales" in m}
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    total = sum(array.nbytes for _, array in parameters)
    with _lean_memory(), _progress(total) as bar:
        while sources:
            _read(sources[-1].name, sources[-1].array, checkpoint)
            _check_scales(sources.pop(), checkpoint)
        for name, array in parameters:
            _read(name, array, checkpoint)
            module, _, leaf = name.rpartition(".")
            if leaf in ("scales", "biases"):
                _check_scales(_Scales(name, array, formats[module]), checkpoint)
            bar.update(array.nbytes)


def _read(name: str, array: mx.array, checkpoint: Checkpoint) -> None:
    """Read a lazy array; the error of a failing disk says which."""
    try:
        mx.eval(array)
    except RuntimeError as error:
        raise RuntimeError(f"[loader] {checkpoint.path}: {name}: {error}") from None


def _check_scales(scales: _Scales, checkpoint: Checkpoint) -> None:
    """Raise ValueError if a scale is NaN, infinite or, for FP8 blocks, not positive."""
    name, array, fmt = scales
    if array.dtype == mx.uint8:
        # e8m0 has one NaN; e4m3, of nvfp4, has one for each sign.
        e4m3 = fmt is not None and fmt.mode == "nvfp4"
        bad, expected = (array & 0x7F) == 0x7F if e4m3 else array == 0xFF, "no NaN"
    elif name.endswith("_scale_inv"):
        bad, expected = ~((array > 0) & mx.isfinite(array)), "positive finite numbers"
    else:
        bad, expected = ~mx.isfinite(array), "finite numbers"
    if not bad.any().item():
        return
    index = np.argwhere(to_numpy(bad))[0].tolist()
    value = array[tuple(index)].item()
    if name not in checkpoint.tensors:
        name, index = _stored_name(name, index, checkpoint)
    raise ValueError(f"[loader] {name} has {value} at {index}, expected {expected}.")


def _stored_name(name: str, index: list[int], checkpoint: Checkpoint) -> tuple[str, list[int]]:
    """The tensor, and where in it, that one of a parameter's numbers was read from."""
    expert, rest = name.replace(".switch_mlp.", f".experts.{index[0]}."), index[1:]
    packed = expert.removesuffix("scales") + "weight_scale"
    if expert in checkpoint.tensors:
        return expert, rest
    if packed in checkpoint.tensors:
        return packed, index if expert == name else rest
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


def _progress(total: int) -> "tqdm[Any]":
    return tqdm(
        total=total,
        desc="Loading",
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    )
