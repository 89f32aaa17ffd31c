"""Writes Flash-MoE sidecars of GGUF models, and compares them with what they were written of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..checkpoint.checked import checked
from ..checkpoint.folder import Checkpoint
from ..checkpoint.gguf_names import gguf_name
from ..checkpoint.gguf_types import TYPES_BY_NAME
from ..checkpoint.safetensors_header import TensorInfo
from ..models.config import ModelArgs
from ..models.tensor_names import is_expert, layer_of
from .flashmoe import FlashMoeSidecar
from .flashmoe_manifest import KIND, SCHEMA, WHOLE
from .sidecar import MANIFEST, layer_file, write_json

_CHUNK = 1 << 24


def export(model: str | os.PathLike[str], folder: Path) -> FlashMoeSidecar:
    """Write the routed experts of a GGUF model to a new folder, whole tensors, with SHA-256.

    Raises ValueError for a model that is not GGUF or has no routed experts, FileExistsError for a
    folder that holds something, and whatever opening the model and reading it raises.
    """
    checkpoint = Checkpoint.open(model)
    args, _ = checked(checkpoint)
    if checkpoint.metadata is None:
        raise ValueError(f"[sidecar] {checkpoint.path} is a folder, expected a GGUF file.")
    experts = _experts(checkpoint, args)
    if not experts:
        raise ValueError(f"[sidecar] {checkpoint.path} has no routed experts.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"[sidecar] {folder} is not empty, expected an empty or new folder.")
    entries = [
        entry
        for layer, names in experts.items()
        for entry in _write(checkpoint, layer, names, folder)
    ]
    _write_manifest(folder / MANIFEST, checkpoint, args, entries)
    return FlashMoeSidecar.open(folder)


def whole_model(model: str | os.PathLike[str], sidecar: FlashMoeSidecar) -> Checkpoint:
    """The checkpoint that has the sidecar's tensors itself, to compare them with.

    Raises ValueError, naming the tensor, where it lacks one.
    """
    checkpoint = Checkpoint.open(model)
    for entry in sidecar.entries:
        if entry.model_name not in checkpoint.tensors:
            raise ValueError(
                f"[sidecar] {checkpoint.path} has no {entry.name}, expected a model with its"
                " routed experts to compare them with."
            )
    return checkpoint


def problems(sidecar: FlashMoeSidecar, checkpoint: Checkpoint | None) -> Iterator[tuple[str, str]]:
    """Read all of a sidecar: yields each tensor's name and what is wrong with it, or "".

    A tensor is held against its SHA-256, where the manifest has one, and against the checkpoint's.
    Raises ValueError where there is neither.
    """
    if checkpoint is None and any(entry.sha256 is None for entry in sidecar.entries):
        raise ValueError(
            f"[sidecar] {sidecar.path} has no checksums, name the GGUF model that its experts are"
            " of to compare them with (--model)."
        )
    for entry in sidecar.entries:
        wrong = []
        with (sidecar.path / entry.file).open("rb") as file:
            ours = hashlib.sha256()
            for e in range(entry.shape[0]):
                file.seek(entry.offset + e * entry.stride)
                ours.update(file.read(entry.expert_bytes))
        if entry.sha256 is not None and ours.hexdigest() != entry.sha256:
            wrong.append(f"SHA-256 {ours.hexdigest()}, expected {entry.sha256}")
        if checkpoint is not None:
            theirs = _digest(checkpoint, checkpoint.tensors[entry.model_name])
            if ours.hexdigest() != theirs:
                wrong.append(f"is not that of {checkpoint.path}")
        yield entry.name, "; ".join(wrong)


def _experts(checkpoint: Checkpoint, args: ModelArgs) -> dict[int, list[str]]:
    """The names of each layer's tensors of routed experts, in the order of their families."""
    layers: dict[int, list[str]] = {}
    for name in sorted(filter(is_expert, checkpoint.tensors), key=gguf_name):
        layer = layer_of(name)
        assert layer is not None  # such is its name
        if layer < args.num_hidden_layers:
            layers.setdefault(layer, []).append(name)
    return dict(sorted(layers.items()))


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytes]:
    path = checkpoint.folder / info.file
    with path.open("rb") as file:
        file.seek(info.start)
        left = info.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise ValueError(f"[sidecar] {path} ends before byte {info.end}.")
            left -= len(chunk)
            yield chunk


def _digest(checkpoint: Checkpoint, info: TensorInfo) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(checkpoint, info):
        digest.update(chunk)
    return digest.hexdigest()


def _write(
    checkpoint: Checkpoint, layer: int, names: list[str], folder: Path
) -> Iterator[dict[str, Any]]:
    """Write a layer's file; yields the entries of its tensors."""
    with (folder / layer_file(layer)).open("xb") as file:
        for name in names:
            info, offset, digest = checkpoint.tensors[name], file.tell(), hashlib.sha256()
            for chunk in _chunks(checkpoint, info):
                digest.update(chunk)
                file.write(chunk)
            theirs = gguf_name(name)
            yield {
                "layer": layer,
                "tensor_family": theirs.split(".")[2],
                "tensor_name": theirs,
                "original_gguf_tensor_name": theirs,
                "expert_id": None,
                "quant_type": info.dtype,
                "block_size": TYPES_BY_NAME[info.dtype].columns,
                "exact_byte_length": info.nbytes,
                "source_shard": info.file,
                "source_shard_index": list(checkpoint.files).index(info.file),
                "source_offset": info.start,
                "shape": list(reversed(info.shape)),
                "bytes_per_expert": info.nbytes // info.shape[0],
                "repacked_file": layer_file(layer),
                "repacked_offset": offset,
                "sha256": digest.hexdigest(),
            }
        file.flush()
        os.fsync(file.fileno())


def _write_manifest(
    path: Path, checkpoint: Checkpoint, args: ModelArgs, entries: list[dict[str, Any]]
) -> None:
    """Write the manifest in one step, last of all."""
    document = {
        "schema_version": SCHEMA,
        "sidecar_kind": KIND,
        "layout": WHOLE,
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "include_shared": False,
        "filters": {"layers": None, "families": None},
        "source": {"model_files": list(checkpoint.files)},
        "model": {
            "arch": "glm-dsa",
            "expert_count": args.n_routed_experts,
            "expert_used_count": args.num_experts_per_tok,
            "leading_dense_block_count": args.first_k_dense_replace,
        },
        "entries": entries,
    }
    write_json(path, document)
