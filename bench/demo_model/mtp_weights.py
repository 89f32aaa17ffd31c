"""The MTP layer's weights: where they begin, how they are packed, how they join the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from mtp_forward import Weights
from quantize import GROUP_SIZE
from torch import Tensor

from glm_fused.host import to_numpy

LIKE_LAYER = 4  # the decoder layer that it begins as, the last with an indexer
# A residual stream of the model's size would hardly move at the optimizer's steps.
FROM_EMBEDDING, FROM_HIDDEN, OF_LAYER = 0.5, 1.0, 0.1
# The wheel has no room for the bits of the other layers.
BITS = {"indexer": 6, "switch_mlp.down_proj": 3, "switch_mlp": 2, "": 4}
FLOATS = ("norm.weight", "norm.bias", "mlp.gate.weight", "weights_proj.weight", "_bias")


def bits_of(name: str) -> int | None:
    """The bits of a weight, None for one that stays as it is."""
    if name.endswith(FLOATS):
        return None
    return next(bits for part, bits in BITS.items() if part in name)


class Checkpoint:
    """A folder in MLX's layout: its config, and its tensors as float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))
        self.layer = self.config["num_hidden_layers"]

    def floats(self, name: str) -> Tensor:
        """A tensor, with its codes decoded where it is packed."""
        tensor, path = self.tensors[name], name.removesuffix(".weight")
        if f"{path}.scales" in self.tensors:
            planes = tensor, self.tensors[f"{path}.scales"], self.tensors[f"{path}.biases"]
            how = self.config["quantization"][path]
            tensor = mx.dequantize(*planes, group_size=how["group_size"], bits=how["bits"])
        return torch.from_numpy(to_numpy(tensor.astype(mx.float32)))

    def layer_weights(self, layer: int) -> Weights:
        """The weights of a layer, by their names in it."""
        prefix = f"model.layers.{layer}."
        names = [name for name in self.tensors if name.startswith(prefix)]
        names = [name for name in names if not name.endswith((".scales", ".biases"))]
        return {name.removeprefix(prefix): self.floats(name) for name in names}

    def write(self, weights: Weights, folder: Path) -> None:
        """Write the checkpoint to ``folder`` with these weights as its MTP layer."""
        prefix = f"model.layers.{self.layer}."
        tensors = {n: t for n, t in self.tensors.items() if not n.startswith(prefix)}
        formats: dict[str, Any] = {}
        for name, tensor in weights.items():
            path, bits = prefix + name.removesuffix(".weight"), bits_of(name)
            like = self.tensors.get(f"model.layers.{LIKE_LAYER}.{name}")
            kept = like is not None and like.dtype == mx.float32
            array = mx.array(tensor.detach().numpy()).astype(mx.float32 if kept else mx.bfloat16)
            if bits is None:
                tensors[prefix + name] = array
                continue
            formats[path] = {"group_size": GROUP_SIZE, "bits": bits}
            planes = mx.quantize(array, group_size=GROUP_SIZE, bits=bits)
            for plane, values in zip(("weight", "scales", "biases"), planes, strict=True):
                tensors[f"{path}.{plane}"] = values
        config = self.config | {"num_nextn_predict_layers": 1}
        for key in ("quantization", "quantization_config"):
            config[key] = config[key] | formats
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config, indent=4))


def first_weights(checkpoint: Checkpoint) -> Weights:
    """The checkpoint's MTP layer, or one that begins as a layer of the decoder.

    That one's input is the state, as it was before the model's norm, plus some of the embedding.
    """
    if weights := checkpoint.layer_weights(checkpoint.layer):
        return weights
    weights = checkpoint.layer_weights(LIKE_LAYER)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= OF_LAYER
    size = checkpoint.config["hidden_size"]
    norm = checkpoint.floats("model.norm.weight")
    halves = [FROM_EMBEDDING * torch.eye(size), FROM_HIDDEN * torch.diag(1 / norm)]
    return weights | {
        "enorm.weight": torch.ones(size),
        "hnorm.weight": torch.ones(size),
        "eh_proj.weight": torch.cat(halves, dim=1),
        "shared_head.norm.weight": norm.clone(),
    }


def as_packed(weights: Weights) -> Weights:
    """The values that weights have once packed, with the gradients of the weights themselves."""
    packed = {}
    for name, weight in weights.items():
        bits = bits_of(name)
        packed[name] = weight
        if bits is not None:
            packed[name] = weight + (_rounded(weight.detach(), bits) - weight.detach())
    return packed


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """What MLX's affine quantization makes of a weight [..., columns]."""
    groups, most = weight.unflatten(-1, (-1, GROUP_SIZE)), 2**bits - 1
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / most).clamp(min=1e-7)
    from_low = low.abs() > high.abs()
    scale, edge = torch.where(from_low, scale, -scale), torch.where(from_low, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero != 0, edge / zero, scale).bfloat16().float()
    bias = torch.where(zero != 0, edge, 0.0).bfloat16().float()
    codes = ((groups - bias) / scale).round().clamp(0, most)
    return (codes * scale + bias).flatten(-2)
