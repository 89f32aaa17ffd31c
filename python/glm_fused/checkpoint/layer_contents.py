"""What tensors say of a checkpoint's layers: how many experts each has, and which are for MTP."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..models.config import ModelArgs
from ..models.layer_spec import LayerSpec
from ..models.tensor_names import MTP_REASON, layer_of, unused
from ..models.tensors import layer_modules
from .safetensors_header import TensorInfo

_EXPERT = re.compile(r"model\.layers\.([0-9]{1,6})\.mlp\.experts\.([0-9]{1,6})\.")
_STACKED = re.compile(
    r"model\.layers\.([0-9]{1,6})\.mlp\.(?:switch_mlp|experts)\.(?:gate|up|down|gate_up)_proj\b"
)


@dataclass
class MtpLayer:
    """A layer that predicts further tokens: its tensors, their bytes, and what it lacks."""

    layer: int
    tensors: int = 0
    nbytes: int = 0
    missing: list[str] = field(default_factory=list)


def check_expert_counts(args: ModelArgs, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError where ``num_routed_experts_per_layer`` is not what the tensors have.

    Without that key one number is for all layers, and a layer with another has tensors that are
    missing, unexpected or of another shape.
    """
    listed = args.num_routed_experts_per_layer
    if listed is None:
        return
    counts = dict(_expert_counts(tensors))
    for layer in (*args.layers, *args.mtp_layers)[: len(listed)]:
        found = counts.get(layer.index, layer.experts)
        if found != layer.experts:
            raise ValueError(
                f"[checkpoint] model.layers.{layer.index} has tensors of {found} experts, but"
                f" num_routed_experts_per_layer[{layer.index}] in config.json is {layer.experts}."
            )


def _expert_counts(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[int, int]]:
    """Each layer with experts and how many there are, numbered from 0 or stacked."""
    single: dict[int, set[int]] = {}
    for name, info in tensors.items():
        if match := _EXPERT.match(name):
            single.setdefault(int(match[1]), set()).add(int(match[2]))
        elif (match := _STACKED.match(name)) and info.shape:
            yield int(match[1]), info.shape[0]
    yield from ((layer, len(experts)) for layer, experts in single.items())


def mtp_layers(args: ModelArgs, tensors: Mapping[str, TensorInfo]) -> list[MtpLayer]:
    """The MTP layers that a checkpoint has and the model does not use."""
    found: dict[int, MtpLayer] = {}
    names = set()
    for name, info in tensors.items():
        if unused(name, args) != MTP_REASON:
            continue
        names.add(name)
        index = layer_of(name)
        assert index is not None  # such is its name
        layer = found.setdefault(index, MtpLayer(index))
        layer.tensors += 1
        layer.nbytes += info.nbytes
    for spec in args.mtp_layers:
        if spec.index in found:
            found[spec.index].missing = list(_missing(args, spec, names))
    return [found[index] for index in sorted(found)]


def _missing(args: ModelArgs, spec: LayerSpec, names: set[str]) -> Iterator[str]:
    """The weights that a layer has in none of their forms."""
    release = any(f"model.layers.{spec.index}.mlp.experts." in name for name in names)
    for module in layer_modules(args, spec):
        form = module.form_in(names, default=1 if release else 0)
        for path in form.paths(module.experts):
            name = path + form.suffix
            if form.first_row == 0 and name not in names and f"{name}_packed" not in names:
                yield name
