"""Where in a checkpoint's files a rank's part of each tensor is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from ..formats.weights import FP8_BLOCK
from ..models.config import ModelArgs
from ..models.planes import stack
from ..models.tensors import Form, Module, modules
from .folder import Checkpoint

Headers = dict[str, dict[str, dict[str, Any]]]  # of a safetensors header, by file and tensor


class Rows(NamedTuple):
    """Rows of a weight that are wanted.

    Attributes:
        matrices: how many it is stacked of; 1 for one that is not.
        of_each: how many rows it has, or heads where those are the first axis.
        wanted: the rows wanted of each, in order: several where modules share the tensor.
    """

    matrices: int
    of_each: int
    wanted: tuple[slice, ...]


def stored_rows(
    checkpoint: Checkpoint, args: ModelArgs, parts: Mapping[str, slice]
) -> dict[str, Rows]:
    """The rows that are wanted of each tensor, where ``parts`` are wanted of some modules.

    Those of a packed weight are of its values: its scales may have a row for several.
    """
    names = defaultdict(list)
    for name in checkpoint.tensors:
        names[name.rpartition(".")[0]].append(name)
    found: dict[str, Rows] = {}
    for module in modules(args):
        if module.path not in parts:
            continue
        form = module.form_in(checkpoint.tensors)
        rows = _rows(module, form, parts[module.path])
        for path in form.paths(module.experts):
            for name in names[path] if form.suffix else [path]:
                known = found[name].wanted if name in found else ()
                others = tuple(wanted for wanted in rows.wanted if wanted not in known)
                found[name] = rows._replace(wanted=known + others)
    return found


def _rows(module: Module, form: Form, part: slice) -> Rows:
    if module.shard == 1 and not form.of_single_experts:
        first = form.first_row
        wanted = slice(first + part.start, first + part.stop)
        return Rows(form.shape[0], form.shape[1], (wanted,))
    count = form.shape[0]
    # Where heads of a tensor are shared by modules, each of them wants whole heads.
    per_head = 1 if module.shard == 1 else count // module.shape[0]
    return Rows(1, count, (slice(part.start * per_head, part.stop * per_head),))


def split_headers(
    headers: Headers, rows: Mapping[str, Rows]
) -> tuple[Headers, dict[str, list[list[str]]]]:
    """Headers with a piece for each run of the rows that are wanted, for whole tensors elsewhere.

    Also returns the names of pieces by tensor, those of each matrix. Raises ValueError, naming the
    tensor, where rows that are wanted share a row of scales with others.
    """
    split: Headers = {}
    pieces: dict[str, list[list[str]]] = {}
    for file, header in headers.items():
        split[file] = {}
        for name, entry in header.items():
            if name not in rows or (unit := unit_of(name, entry["shape"], rows[name])) is None:
                split[file][name] = entry
                continue
            found = list(_pieces(name, entry, rows[name], unit))
            split[file].update(piece for of_matrix in found for piece in of_matrix)
            pieces[name] = [[piece for piece, _ in of_matrix] for of_matrix in found]
    return split, pieces


def unit_of(name: str, shape: tuple[int, ...], rows: Rows) -> int | None:
    """How many rows of a weight a row of one of its tensors is for; None where it has no rows.

    Raises ValueError, naming the tensor, where rows that are wanted share a row of it with others.
    """
    axis, is_bias = int(rows.matrices > 1), name.endswith(".bias")
    if len(shape) < axis + 2 and not is_bias:
        return None  # a factor, a scale of activations, a shape
    if shape[axis] == rows.of_each:
        return 1
    if shape[axis] != -(-rows.of_each // FP8_BLOCK):
        raise ValueError(
            f"[loader] {name} has {shape[axis]} rows, expected {rows.of_each} or one for each"
            f" {FP8_BLOCK}."
        )
    for wanted in rows.wanted:
        if wanted.start % FP8_BLOCK or wanted.stop % FP8_BLOCK:
            raise ValueError(
                f"[loader] {name} has a row for each {FP8_BLOCK} of its weight's: a rank cannot"
                f" have rows {wanted.start} to {wanted.stop - 1} of these."
            )
    return FP8_BLOCK


def _pieces(
    name: str, entry: Mapping[str, Any], rows: Rows, unit: int
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """For each matrix the names and header's entries of the runs of rows that are wanted."""
    axis = int(rows.matrices > 1)
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    row_bytes = (end - begin) // math.prod(shape[: axis + 1])
    for matrix in range(rows.matrices):
        found = []
        for wanted in rows.wanted:
            first, stop = wanted.start // unit, wanted.stop // unit
            at = begin + (matrix * shape[axis] + first) * row_bytes
            described = {
                "dtype": entry["dtype"],
                "shape": (stop - first, *shape[axis + 1 :]),
                "data_offsets": [at, at + (stop - first) * row_bytes],
            }
            found.append((f"{name} {matrix} {first}", described))
        yield found


def join_pieces(weights: dict[str, mx.array], pieces: Mapping[str, list[list[str]]]) -> None:
    """Put the tensors of which ``weights`` has pieces in their place."""
    for name, matrices in pieces.items():
        parts = [[weights.pop(piece) for piece in of_matrix] for of_matrix in matrices]
        joined = [runs[0] if len(runs) == 1 else mx.concatenate(runs) for runs in parts]
        weights[name] = joined[0] if len(joined) == 1 else stack(joined)
