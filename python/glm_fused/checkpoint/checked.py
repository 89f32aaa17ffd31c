"""What a checkpoint is, once its headers fit its config."""

from __future__ import annotations

from ..models.config import ModelArgs, args_from_config
from .declaration import quantization_from_config
from .folder import Checkpoint
from .inventory import check_tensors, holds_layer
from .layer_contents import mtp_layers
from .stored import Inventory


def checked(checkpoint: Checkpoint, mtp: bool = False) -> tuple[ModelArgs, Inventory]:
    """The model's args, and every weight of it and where that is; no data is read.

    With ``mtp`` the layer that predicts one token more is a part of the model.

    Raises ValueError, naming the key of the config or the tensors, for a config that is none and
    for tensors that do not fit it. The config of a GGUF file is made of its metadata, so errors
    name the file too.
    """
    try:
        args = args_from_config(checkpoint.config)
        args = args.with_mtp() if mtp else args
        quantization = quantization_from_config(checkpoint.config)
        return args, check_tensors(args, quantization, checkpoint.tensors)
    except ValueError as error:
        if checkpoint.metadata is None:
            raise
        raise ValueError(f"[gguf] {checkpoint.path}: {error}") from None


def has_whole_mtp(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has every weight of the layer that predicts one token more.

    Raises ValueError for a config that is none.
    """
    args = args_from_config(checkpoint.config)
    whole = {found.layer for found in mtp_layers(args, checkpoint.tensors) if not found.missing}
    return any(spec.index in whole for spec in args.mtp_layers[:1])


def holds_mtp(checkpoint: Checkpoint) -> bool:
    """Whether there is anything of a layer that predicts one token more.

    Raises ValueError for a config that is none.
    """
    specs = args_from_config(checkpoint.config).mtp_layers
    return bool(specs) and holds_layer(checkpoint.tensors, specs[0].index)
