"""Checkpoint tensors to parameters: experts stacked, ``kv_b_proj`` split, other FP8 to bfloat16."""

from collections.abc import Mapping

import mlx.core as mx

from ..formats.weights import FP8, FP8_BLOCK, PLANES, Format, Weight, plane_names
from .config import ModelArgs
from .planes import stack
from .tensor_names import unused
from .tensors import Form, Module, modules


def sanitize(
    weights: dict[str, mx.array], args: ModelArgs, formats: Mapping[str, Format]
) -> dict[str, mx.array]:
    """Bring any supported layout to that of the model; ``formats`` are those of packed modules.

    Works in place, on lazy arrays, and evaluates nothing; each source is popped as it is used.
    Tensors already in the MLX layout stay as they are. Raises ValueError, naming the tensor, for
    sources that are incomplete or do not fit together.
    """
    for name in [name for name in weights if unused(name, args)]:
        del weights[name]
    for name in [name for name in weights if name.endswith(".weight_scale_inv")]:
        scale_inv, target = weights.pop(name), name.removesuffix("_scale_inv")
        if target not in weights:
            raise ValueError(f"[weights] {name} scales {target}, which is missing.")
        if formats.get(path := target.removesuffix(".weight")) == FP8:
            weights[f"{path}.scales"] = scale_inv
            continue
        weights[target] = dequantize_fp8(target, weights[target], scale_inv)
    for module in modules(args):
        if module.experts:
            _stack_experts(weights, module)
        elif module.kind == "embed_q":
            _split_kv_b(weights, module, args, formats)
    return weights


def dequantize_fp8(name: str, weight: mx.array, scale_inv: mx.array) -> mx.array:
    """e4m3 codes [m, n] times the scale of their 128 x 128 block, in float32, as bfloat16."""
    if weight.ndim != 2 or weight.dtype != mx.uint8:
        raise ValueError(
            f"[weights] {name} is {weight.dtype} {weight.shape}, expected e4m3 [m, n]."
        )
    m, n = weight.shape
    blocks = (-(-m // FP8_BLOCK), -(-n // FP8_BLOCK))
    if scale_inv.shape != blocks:
        raise ValueError(
            f"[weights] {name}_scale_inv is {scale_inv.shape}, expected {blocks} for its"
            f" weight of {weight.shape}."
        )
    if m % FP8_BLOCK or n % FP8_BLOCK:
        weight = mx.pad(weight, [(0, -m % FP8_BLOCK), (0, -n % FP8_BLOCK)])
    values = mx.from_fp8(weight, dtype=mx.float32)
    values = values.reshape(blocks[0], FP8_BLOCK, blocks[1], FP8_BLOCK)
    values = values * scale_inv.astype(mx.float32)[:, None, :, None]
    values = values.astype(mx.bfloat16).reshape(weight.shape)
    return values if values.shape == (m, n) else mx.contiguous(values[:m, :n])


def _stack_experts(weights: dict[str, mx.array], module: Module) -> None:
    for form in module.other_forms:
        if not form.of_single_experts:
            _take_rows(weights, module, form)
            continue
        first, *_ = form.paths(1)
        for part in PLANES:
            if f"{first}.{part}" in weights:
                names = [f"{path}.{part}" for path in form.paths(module.experts)]
                weights[f"{module.path}.{part}"] = stack(_pop_alike(weights, names))


def _take_rows(weights: dict[str, mx.array], module: Module, form: Form) -> None:
    """A module's rows of the stacked experts, which it may share with another module."""
    name = form.path + form.suffix
    if name not in weights:
        return
    rows, joined = module.shape[1], weights[name]
    if rows == form.shape[1]:
        weights[f"{module.path}.weight"] = weights.pop(name)
        return
    if joined.ndim != 3 or joined.shape[1] != form.shape[1]:
        raise ValueError(f"[weights] {name} is {joined.shape}, expected {list(form.shape)}.")
    end = form.first_row + rows
    weights[f"{module.path}.weight"] = mx.contiguous(joined[:, form.first_row : end])
    if end == form.shape[1]:
        del weights[name]


def _pop_alike(weights: dict[str, mx.array], names: list[str]) -> list[mx.array]:
    """The tensors of all experts, which have to be alike."""
    parts: list[mx.array] = []
    for name in names:
        if name not in weights:
            raise ValueError(f"[weights] {name} is missing, expert 0 has it.")
        parts.append(weights.pop(name))
        if parts[-1].shape != parts[0].shape or parts[-1].dtype != parts[0].dtype:
            raise ValueError(
                f"[weights] {name} is {parts[-1].dtype} {parts[-1].shape}, expected"
                f" {parts[0].dtype} {parts[0].shape} like expert 0."
            )
    return parts


def _split_kv_b(
    weights: dict[str, mx.array], module: Module, args: ModelArgs, formats: Mapping[str, Format]
) -> None:
    """[heads * (nope + v), kv_lora] to embed_q [heads, kv_lora, nope], unembed_out [heads, v, …].

    Packed rows go to ``unembed_out`` as they are. ``embed_q`` is transposed, so it is quantized
    again in the same format, or stays dense where the groups do not divide ``nope``.
    """
    (form,), prefix = module.other_forms, module.path.rpartition(".")[0]
    path, heads, nope = form.path, args.num_attention_heads, args.qk_nope_head_dim
    if f"{path}.weight" not in weights:
        return
    found = {part: weights.pop(f"{path}.{part}", None) for part in PLANES}
    parts = {part: array for part, array in found.items() if array is not None}
    rows, _ = form.shape
    for part, array in parts.items():
        if array.ndim != 2 or array.shape[0] != rows:
            raise ValueError(f"[weights] {path}.{part} is {array.shape}, expected {rows} rows.")
        per_head = array.reshape(heads, nope + args.v_head_dim, -1)
        parts[part] = per_head[:, :nope]
        weights[f"{prefix}.unembed_out.{part}"] = mx.contiguous(per_head[:, nope:])
    embed_q, fmt = parts["weight"], None
    if "scales" in parts:
        fmt = _declared(path, parts, formats)
        packed = Weight([mx.contiguous(parts[name]) for name in plane_names(fmt)], fmt)
        embed_q = mx.dequantize(packed.planes[0], **packed.quantization)
    embed_q = mx.contiguous(embed_q.swapaxes(-1, -2))
    if fmt is None or nope % fmt.group_size:
        weights[f"{prefix}.embed_q.weight"] = embed_q
        return
    quantized = mx.quantize(embed_q, **fmt.parameters)
    for name, array in zip(plane_names(fmt), quantized, strict=True):
        weights[f"{prefix}.embed_q.{name}"] = array


def _declared(path: str, parts: Mapping[str, mx.array], formats: Mapping[str, Format]) -> Format:
    """The format of a packed module, whose parts have to be its planes."""
    fmt = formats.get(path)
    if fmt is None:
        raise ValueError(f"[weights] {path} is packed, but no format is declared for it.")
    if parts.keys() != set(plane_names(fmt)):
        expected, found = ", ".join(plane_names(fmt)), ", ".join(parts)
        raise ValueError(f"[weights] {path} is {fmt}: expected {expected}, found {found}.")
    return fmt
