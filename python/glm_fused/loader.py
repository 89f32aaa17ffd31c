"""Loads a checkpoint: strict, checked before any data is read, within its own size of memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint import compressed_tensors, gguf_config, modelopt
from .checkpoint.checked import checked
from .checkpoint.compressed_tensors import check_stored_shapes
from .checkpoint.folder import Checkpoint
from .checkpoint.lazy_tensors import allow_open_files, read_lazily
from .checkpoint.reading import Scales, hidden_scales, read_parameters
from .checkpoint.stored import Inventory
from .formats.kv_rows import check_kv_format
from .formats.weights import Format, plane_names
from .generation.options import Options, checkpoint_options, set_defaults
from .generation.tokenizer import load_tokenizer
from .models import kernels
from .models.config import ModelArgs
from .models.decoder import Model
from .models.line import Line
from .models.packed_blocks import split_blocks
from .models.packed_floats import to_nvfp4
from .models.packed_integers import to_affine
from .models.pipeline import Stage, StagedModel
from .models.planes import dequantize_unknown
from .models.ranks import Ranks
from .models.sanitize import sanitize
from .models.shard import Sharding
from .models.tensor_names import is_expert
from .streaming.banks import attach_banks, find_source, plan_streaming
from .streaming.flashmoe import with_experts
from .streaming.model import StreamedModel, StreamedStage
from .streaming.options import StreamOptions
from .validation import show

# How each method's weights become planes, and a tensor that each of them has.
_CONVERSIONS = {
    compressed_tensors.METHOD: (to_affine, "weight_scale"),
    modelopt.METHOD: (to_nvfp4, "weight_scale"),
    gguf_config.METHOD: (split_blocks, "weight"),
}


@dataclass(frozen=True)
class Opened:
    """A checkpoint and its model, over parameters that are read when they are first used.

    ``scales`` are those that no parameter of the model will show. ``cache_limit`` is MLX's, in
    bytes, from before streaming lowered it; None where it did not. ``only_mlx_formats`` tells that
    the model's parameters are in formats that MLX knows. ``ranks`` share the model; None where
    there are none.
    """

    model: Model
    checkpoint: Checkpoint
    scales: list[Scales]
    cache_limit: int | None = None
    only_mlx_formats: bool = False
    ranks: Ranks | Line | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config, or what MLX would write of a model in formats that it knows."""
        return _config_as_loaded(self.checkpoint.config, self.model, self.only_mlx_formats)

    def read(self) -> None:
        """Read the parameters one by one, and check scales; errors are those of `load_model`."""
        read_parameters(self.model, self.checkpoint, self.scales)

    def compile(self, on_compile: kernels.OnCompile = kernels.unseen) -> None:
        """Compile the model's kernels on Metal; see `glm_fused.models.kernels`."""
        kernels.compile_kernels(self.model, on_compile)
        if isinstance(self.ranks, Ranks):
            self.ranks.forget()  # what was made to be compiled is never evaluated

    def restore_limit(self) -> None:
        """Give MLX back the limit that it had, once the model is not used any more."""
        if self.cache_limit is not None:
            mx.set_cache_limit(self.cache_limit)


def load_model(
    path: str | os.PathLike[str],
    lazy: bool = False,
    kv_format: str = "auto",
    stream: StreamOptions | None = None,
    compile_kernels: bool = True,
    prefill_step_size: int | None = None,
    mtp: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """Load the model that ``path`` names; returns it and its config.

    `glm_fused.Engine` does the same with everything that a session needs.

    Args:
        path: the folder of a checkpoint, or a GGUF file, of shards the first; "demo" is the bundled
            model where there is no folder of that name.
        lazy: read parameters when they are first used, without a check of scales for NaN. The
            values of one that cannot be read then are undefined, so load the model anew.
        kv_format: how the model's caches store keys: "auto" (as the activations), "bf16", "fp16",
            "fp32", "fp8" or "int8".
        stream: read routed experts as they are needed; ``model.streaming`` has the plan and
            counters, and scales of experts are not checked for NaN.
        compile_kernels: on Metal, compile what steps and prompts launch now, and not when they
            first do.
        prefill_step_size: how many tokens of a prompt the model takes at a time; None: as many as
            fit in memory, up to 2,048.
        mtp: load the layer that predicts one token more, too, with which the model drafts.

    Returns:
        The model, which takes integer tokens [batch, length] and gives logits [batch, length,
        vocabulary], and config.json with the stop tokens of generation_config.json; that of a
        checkpoint of compressed-tensors comes as MLX would write it of the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something does not fit; the message names file and tensor with what was found
            and expected, or the budget with what would fit.
        RuntimeError: a parameter, which the message names, cannot be read.
    """
    opened = open_model(path, kv_format, stream, prefill_step_size, mtp=mtp)
    if not lazy:
        opened.read()
    if compile_kernels:
        opened.compile()
    return opened.model, opened.config


def load(
    path: str | os.PathLike[str],
    kv_format: str = "auto",
    stream: StreamOptions | None = None,
    compile_kernels: bool = True,
    prefill_step_size: int | None = None,
    mtp: bool = False,
) -> tuple[Model, TokenizerWrapper]:
    """Load the model that ``path`` names and its tokenizer.

    Arguments are those of `glm_fused.load_model`.

    Returns the model and the tokenizer, as `glm_fused.generate` takes them. Raises what
    `glm_fused.load_model` does, and ValueError for a tokenizer that does not load, before any
    weights are read.
    """
    opened = open_model(path, kv_format, stream, prefill_step_size, mtp=mtp)
    tokenizer = load_tokenizer(opened.checkpoint)
    opened.read()
    if compile_kernels:
        opened.compile()
    return opened.model, tokenizer


def open_model(
    path: str | os.PathLike[str],
    kv_format: str,
    stream: StreamOptions | None,
    prefill_step_size: int | None = None,
    only_mlx_formats: bool = False,
    mtp: bool = False,
    ranks: Ranks | Line | None = None,
) -> Opened:
    """Check a checkpoint and make its model; no data is read. Errors are those of `load_model`.

    Of ``ranks``, which share the model, each reads its part of it.

    With ``only_mlx_formats`` a weight in another format becomes dense, in bfloat16; streamed
    experts do not.
    """
    check_kv_format(kv_format)
    checkpoint = Checkpoint.open(path)
    if stream is not None and stream.sidecar is not None:
        checkpoint = with_experts(checkpoint, Path(stream.sidecar))
    args, inventory = checked(checkpoint, mtp)
    _check_stop_tokens(checkpoint, args)
    formats = inventory.formats
    share = None if ranks is None else _share(args, inventory, ranks)
    if stream is not None:
        source = find_source(checkpoint, args, stream.sidecar, share)
        plan = plan_streaming(inventory, args, source, stream, kv_format, prefill_step_size, share)
    check_stored_shapes(checkpoint, inventory.written_by(compressed_tensors.METHOD))
    weights = read_lazily(checkpoint, args, None if share is None else share.parts())
    if share is not None:
        weights = {name: array for name, array in weights.items() if share.has(name)}
    in_folder = checkpoint.metadata is None
    defaults = checkpoint_options(checkpoint.path) if in_folder else Options()
    cache_limit = None
    if stream is None:
        model = StagedModel(args) if isinstance(ranks, Line) else Model(args)
    else:
        model = StreamedStage(args) if isinstance(ranks, Line) else StreamedModel(args)
        allow_open_files(len(checkpoint.files) + len(source.files))
        model.streaming = attach_banks(model, args, source, plan, stream, formats, share)
        cache_limit = mx.set_cache_limit(plan.shares.staging)
        prefill_step_size = plan.prefill_step_size
        weights = {name: array for name, array in weights.items() if not is_expert(name)}
    model.kv_format = kv_format
    model.prefill_step_size = prefill_step_size
    set_defaults(model, defaults)
    scales = hidden_scales(weights, args, formats, only_mlx_formats)
    if share is not None:
        args = share.local_args(args)
        share.keep(model)
    weights = _as_parameters(weights, inventory, args, only_mlx_formats)
    _pack_modules(model, weights, formats)
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    if share is not None:
        share.join(model)
    return Opened(model, checkpoint, scales, cache_limit, only_mlx_formats, ranks)


def _share(args: ModelArgs, inventory: Inventory, ranks: Ranks | Line) -> Sharding | Stage:
    """What this one of the ranks has of the model."""
    if isinstance(ranks, Line):
        return Stage.of(args, inventory.loaded_bytes, ranks)
    return Sharding.of(args, inventory.formats, ranks, inventory.block_rows)


def _as_parameters(
    weights: dict[str, mx.array], inventory: Inventory, args: ModelArgs, only_mlx_formats: bool
) -> dict[str, mx.array]:
    """The tensors that were read, under the names and in the formats of the model's parameters."""
    for method, (convert, part) in _CONVERSIONS.items():
        found = inventory.written_by(method).items()
        here = {path: fmt for path, (fmt, _) in found if f"{path}.{part}" in weights}
        convert(weights, here, args)  # streamed experts are not here
    weights = sanitize(weights, args, inventory.formats)
    if only_mlx_formats:
        dequantize_unknown(weights, inventory.formats)
    return weights


def _config_as_loaded(
    config: dict[str, Any], model: Model, only_mlx_formats: bool
) -> dict[str, Any]:
    """The config with which the model's parameters, once saved, are a checkpoint for MLX.

    It stays as it is where MLX wrote it, and where parameters may be in a format of another method.
    """
    if config.get("quantization") is not None:
        return config
    declared = config.get("quantization_config") or config.get("hf_quant_config") or {}
    method = declared.get("quant_method")
    converted = only_mlx_formats or method == compressed_tensors.METHOD
    if method is None or not converted:
        return config
    formats = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in model.named_modules()
        if "scales" in module
    }
    declarations = ("quantization_config", "hf_quant_config")
    rest = {key: value for key, value in config.items() if key not in declarations}
    if not formats:
        return rest
    usual = max(formats.values(), key=list(formats.values()).count)
    others = {path: entry for path, entry in formats.items() if entry != usual}
    return rest | {"quantization": usual | others}


def _check_stop_tokens(checkpoint: Checkpoint, args: ModelArgs) -> None:
    """Refuse stop tokens that the model cannot choose: a text would never end at them."""
    found = checkpoint.config.get("eos_token_id")
    for token in found if isinstance(found, list) else [found]:
        if token is not None and token >= args.vocab_size:
            raise ValueError(
                f"[loader] {checkpoint.path}: eos_token_id {show(token)}, expected 0 to"
                f" {args.vocab_size - 1}, as vocab_size says."
            )


def _pack_modules(
    model: Model, weights: Mapping[str, mx.array], formats: Mapping[str, Format]
) -> None:
    """Replace each module whose planes are there by its packed form, which is filled later."""

    def is_packed(path: str, fmt: Format) -> bool:
        """Whether ``weight`` is the format's, and not the floats that became of it."""
        planes = [weights.get(f"{path}.{name}") for name in plane_names(fmt)]
        there = all(plane is not None for plane in planes)
        return there and cast(mx.array, planes[0]).dtype in fmt.planes[0].dtypes

    packed = [
        (path, module.unfilled(formats[path]))
        for path, module in model.named_modules()
        if path in formats and is_packed(path, formats[path])
    ]
    if packed:
        model.update_modules(tree_unflatten(packed))
