"""Compares a checkpoint's headers with what its config needs, before any data is read."""

from collections.abc import Iterator, Mapping

from ..models.config import ModelArgs
from ..models.tensor_names import MTP_REASON, layer_of, unused
from ..models.tensors import modules
from .gguf_formats import TypedTensors
from .gguf_names import gguf_name
from .layer_contents import check_expert_counts
from .quantization import Declaration
from .safetensors_header import TensorInfo, quoted
from .stored import Inventory, Source, Stored
from .weight_checks import Checker

SHOWN = 3  # tensors named per kind of problem
MAX_MISSING = 1000


def check_tensors(
    args: ModelArgs, quantization: Declaration | None, tensors: Mapping[str, TensorInfo]
) -> Inventory:
    """Match headers with a config.

    Raises ValueError, naming the first few tensors of each kind and their number, if tensors are
    missing, unexpected, of another shape or type, or not packed as the config declares.
    """
    _check_mtp(args, tensors)
    check_expert_counts(args, tensors)
    typed = isinstance(quantization, TypedTensors)
    inventory, shown = Inventory(converts_norms=typed), gguf_name if typed else str
    used = _set_aside(args, tensors, inventory)
    checker = Checker(quantization, tensors, used, shown)
    for source in _sources(args, tensors, typed):
        stored = checker.check(source)
        if stored is not None:
            inventory.stored.append(stored)
        if len(checker.missing) >= MAX_MISSING:  # the config may name any number of experts
            missing = [shown(name) for name in checker.missing]
            raise ValueError(f"[checkpoint] {_names('missing', missing, 'at least ')}.")
    _check_experts_alike(inventory, checker.wrong)
    parts = [
        _names(kind, [shown(name) for name in names])
        for kind, names in (("missing", checker.missing), ("unexpected", list(checker.left)))
        if names
    ]
    if checker.wrong:
        parts.append("; ".join(checker.wrong[:SHOWN]) + _more(checker.wrong))
    if parts:
        raise ValueError(f"[checkpoint] {'. '.join(parts)}.")
    return inventory


def _check_mtp(args: ModelArgs, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError where the MTP layer is wanted and the checkpoint has nothing of it."""
    for spec in args.model_layers[len(args.layers) :]:
        if not holds_layer(tensors, spec.index):
            raise ValueError(
                f"[checkpoint] no tensor begins with model.layers.{spec.index}. (or mtp.0.),"
                " expected an MTP layer, as drafts need one."
            )


def holds_layer(tensors: Mapping[str, TensorInfo], index: int) -> bool:
    """Whether any tensor is of this layer."""
    prefix = f"model.layers.{index}."
    return any(name.startswith(prefix) for name in tensors)


def _set_aside(
    args: ModelArgs, tensors: Mapping[str, TensorInfo], inventory: Inventory
) -> dict[str, None]:
    """Count the tensors that the model has no use for; returns the names of the others."""
    mtp_layers = {layer_of(name) for name in tensors if ".eh_proj.weight" in name}
    used: dict[str, None] = {}
    for name in tensors:
        reason = unused(name, args)
        # A layer too many that is no MTP layer means another config.
        too_many = reason == MTP_REASON and layer_of(name) not in (None, *mtp_layers)
        if reason is None or too_many:
            used[name] = None
        else:
            inventory.ignored[reason] = inventory.ignored.get(reason, 0) + 1
    return used


def _sources(args: ModelArgs, names: Mapping[str, TensorInfo], stacked: bool) -> Iterator[Source]:
    """The weights to find. What is in no form is looked for in the one of the rest.

    ``stacked`` tells that no expert has tensors of its own, however the others are stored.
    """
    signs = () if stacked else (".mlp.experts.", ".kv_b_proj.")
    release = any(sign in name for name in names for sign in signs)
    for module in modules(args):
        form = module.form_in(names, default=1 if release else 0)
        if form.first_row == 0:  # else the tensor is another module's as well, and that one's here
            for path in form.paths(module.experts):
                yield Source(path, path + form.suffix, module, form)


def _check_experts_alike(inventory: Inventory, wrong: list[str]) -> None:
    """Experts are stacked, so one format has to serve all of a projection."""
    first: dict[str, Stored] = {}
    for stored in inventory.stored:
        if not stored.source.module.experts:
            continue
        other = first.setdefault(stored.source.module.path, stored)
        if stored.format != other.format:
            wrong.append(
                f"{stored.source.tensor} is {stored.format}, expected {other.format} like"
                f" {other.source.tensor}"
            )


def _names(kind: str, names: list[str], at_least: str = "") -> str:
    noun = "tensor" if len(names) == 1 else "tensors"
    shown = ", ".join(_shown(name) for name in names[:SHOWN])
    return f"{at_least}{len(names)} {kind} {noun}: {shown}{_more(names)}"


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 200 else quoted(name)


def _more(items: list[str]) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
