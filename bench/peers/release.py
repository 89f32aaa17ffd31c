"""Writes the bundled model as its release would be: for peers that know no MLX checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.formats.weights import dequantize
from glm_fused.loader import load_model
from glm_fused.models.decoder import Model
from glm_fused.models.tensors import Module, modules
from glm_fused.ops import Weight


def floats(model: Model, module: Module) -> mx.array:
    """A module's weight in bfloat16, or as it is where it is not packed."""
    found = dict(model.named_modules())[module.path]
    if "scales" not in found:
        return found.weight
    weight = found.as_weight()
    if weight.planes[0].ndim == 2:
        return dequantize(weight, mx.bfloat16)
    matrices = range(weight.planes[0].shape[0])
    parts = [Weight([plane[i] for plane in weight.planes], weight.format) for i in matrices]
    return mx.stack([dequantize(part, mx.bfloat16) for part in parts])


def released(model: Model) -> Iterator[tuple[str, mx.array]]:
    """The model's tensors under the names and in the shapes that the release has."""
    embed_q = None
    for module in modules(model.args):
        values = floats(model, module)
        if module.kind == "embed_q":  # [heads, rank, nope]; its other half comes next
            embed_q = values.swapaxes(1, 2)
        elif module.kind == "unembed_out":
            rows = mx.concatenate([embed_q, values], axis=1)
            yield f"{module.other_forms[0].path}.weight", rows.reshape(-1, rows.shape[-1])
        elif module.experts:
            form = next(form for form in module.other_forms if form.of_single_experts)
            for path, one in zip(form.paths(module.experts), values, strict=True):
                yield f"{path}.weight", one
        else:
            yield f"{module.path}.weight", values
        if module.bias is not None:
            name = module.bias[0]
            yield f"{module.path}.{name}", dict(model.named_modules())[module.path][name]


def write_release(folder: Path) -> None:
    """Write the bundled model to ``folder``: bfloat16, a tensor for each expert, and tokenizer."""
    model, config = load_model(bundled_folder())
    tensors = {name: mx.contiguous(array) for name, array in released(model)}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    plain = {key: value for key, value in config.items() if not key.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(plain))
    for file in bundled_folder().glob("*token*.json"):
        shutil.copy(file, folder)
