"""Writes a checkpoint as a folder in MLX's formats: mlx-lm's convert does it, with these models."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import convert

from ..checkpoint.checked import checked, has_whole_mtp
from ..checkpoint.folder import Checkpoint
from ..checkpoint.writing import new_folder
from ..engine_options import EngineOptions
from ..formats.weights import QUANTIZED, Format
from ..generation.tokenizer import load_tokenizer
from ..mlx_lm.registration import Loading, register
from ..models.config import ModelArgs
from ..models.tensors import modules
from .target import Types, check_place, check_rows

TYPES = tuple(fmt.name for fmt in QUANTIZED)


def to_mlx(model: str | os.PathLike[str], out: Path, types: Types) -> list[Path]:
    """Write the model that ``model`` names to the new folder ``out``; returns the files.

    What ``types`` leave stays as it is, or becomes bfloat16 where MLX has no such format. The
    folder has its name once it is whole. Raises FileExistsError for a folder that holds something,
    ValueError for a model in MLX's formats already where types are given, and for rows that their
    groups do not divide, and whatever loading raises.
    """
    checkpoint = Checkpoint.open(model)
    check_place(out, checkpoint.path)
    args, inventory = checked(checkpoint, has_whole_mtp(checkpoint))
    packed = sorted({str(fmt) for fmt in inventory.formats.values() if fmt in QUANTIZED})
    wanted = [fmt for fmt in types if fmt is not None]
    if wanted and packed:
        raise ValueError(
            f"[convert] {checkpoint.path} is quantized already ({', '.join(packed)}), expected"
            " floats to quantize."
        )
    for module in modules(args):
        if (fmt := types.of(module)) is not None:
            check_rows(f"{module.path}.weight", module.shape[-1], fmt.group_size, fmt)
    load_tokenizer(checkpoint)  # its errors name the file
    with new_folder(out) as made:
        made.rmdir()  # mlx-lm makes it
        _convert(checkpoint.path, made, args, types)
    return sorted(out.iterdir())


def _convert(source: Path, folder: Path, args: ModelArgs, types: Types) -> None:
    wanted = [fmt for fmt in types if fmt is not None]
    how: dict[str, Any] = {}
    if wanted:
        # mlx-lm leaves out rows that the usual group does not divide, so that is the smallest.
        usual = min(wanted, key=lambda fmt: fmt.group_size)
        how = {f"q_{key}": value for key, value in usual.parameters.items()}
        how |= {"quantize": True, "quant_predicate": _predicate(args, types, usual)}
    options = EngineOptions(draft=1, draft_from="mtp") if args.has_mtp else EngineOptions()
    register(Loading(options, only_mlx_formats=True))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where mlx-lm says what it does
            convert(str(source), str(folder), **how)
    finally:
        register()


def _predicate(args: ModelArgs, types: Types, usual: Format) -> Callable[[str, nn.Module], Any]:
    """How mlx-lm quantizes a module, given its path."""
    chosen = {module.path: types.of(module) for module in modules(args)}

    def predicate(path: str, _: nn.Module) -> bool | dict[str, Any]:
        fmt = chosen.get(path)
        return fmt == usual if fmt in (None, usual) else fmt.parameters

    return predicate
