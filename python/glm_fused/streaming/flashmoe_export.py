"""Writes a GGUF model as Flash-MoE has it: a sidecar of routed experts, and a file of the rest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint.checked import checked
from ..checkpoint.folder import Checkpoint
from ..checkpoint.gguf_header import ALIGNMENT, DEFAULT_ALIGNMENT, read_gguf_header
from ..checkpoint.gguf_names import gguf_name
from ..checkpoint.gguf_types import TYPES_BY_NAME
from ..checkpoint.gguf_writer import NewTensor, write_gguf
from ..checkpoint.progress import byte_bar
from ..checkpoint.safetensors_header import TensorInfo
from ..checkpoint.writing import check_space, new_file, new_folder
from ..models.config import ModelArgs
from ..models.tensor_names import is_expert, layer_of
from .flashmoe import FlashMoeSidecar
from .flashmoe_manifest import KIND, SCHEMA, WHOLE
from .sidecar import MANIFEST, layer_file, write_json

DENSE = "dense/model-dense.gguf"
_CHUNK = 1 << 24


def export(model: str | os.PathLike[str], folder: Path) -> FlashMoeSidecar:
    """Write a GGUF model to a new folder: its routed experts, with SHA-256, and `DENSE`.

    That file has the model's metadata and other tensors, byte for byte. The folder has its name
    once it is whole. Raises ValueError for a model that is not GGUF or has no routed experts, and
    where the disk is too small, FileExistsError for a folder that holds something, and whatever
    opening the model and reading it raises.
    """
    checkpoint = Checkpoint.open(model)
    args, _ = checked(checkpoint)
    if checkpoint.metadata is None:
        raise ValueError(
            f"[sidecar] {checkpoint.path} is a folder of safetensors, expected a GGUF file, since"
            " Flash-MoE's sidecars hold its blocks; `glm-fused convert` makes one."
        )
    experts = _experts(checkpoint, args)
    if not experts:
        raise ValueError(f"[sidecar] {checkpoint.path} has no routed experts.")
    with new_folder(folder) as made, byte_bar("Exporting", checkpoint.nbytes) as bar:
        check_space(made, sum(checkpoint.files.values()))
        entries = [
            entry
            for layer, names in experts.items()
            for entry in _write(checkpoint, layer, names, made, bar)
        ]
        _write_dense(checkpoint, {name for names in experts.values() for name in names}, made, bar)
        _write_manifest(made / MANIFEST, checkpoint, args, entries)
    return FlashMoeSidecar.open(folder)


def _experts(checkpoint: Checkpoint, args: ModelArgs) -> dict[int, list[str]]:
    """The names of each layer's tensors of routed experts, in the order of their families."""
    layers: dict[int, list[str]] = {}
    for name in sorted(filter(is_expert, checkpoint.tensors), key=gguf_name):
        layer = layer_of(name)
        assert layer is not None  # such is its name
        if layer < args.num_hidden_layers:
            layers.setdefault(layer, []).append(name)
    return dict(sorted(layers.items()))


def chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor; raises ValueError where its file ends before them."""
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


def _write(
    checkpoint: Checkpoint, layer: int, names: list[str], folder: Path, bar: tqdm[Any]
) -> Iterator[dict[str, Any]]:
    """Write a layer's file; yields the entries of its tensors."""
    with (folder / layer_file(layer)).open("xb") as file:
        for name in names:
            info, offset, digest = checkpoint.tensors[name], file.tell(), hashlib.sha256()
            for chunk in chunks(checkpoint, info):
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
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


def _write_dense(checkpoint: Checkpoint, exported: set[str], folder: Path, bar: tqdm[Any]) -> None:
    """Write the file of all metadata but those of shards, and of the tensors not ``exported``."""
    header = read_gguf_header(checkpoint.path)
    with checkpoint.path.open("rb") as source:
        entries = []
        for key, (first, end) in header.places.items():
            if not key.startswith("split."):
                source.seek(first)
                entries.append(source.read(end - first))
    infos = {gguf_name(n): i for n, i in checkpoint.tensors.items() if n not in exported}
    tensors = [NewTensor(name, TYPES_BY_NAME[i.dtype], i.shape) for name, i in infos.items()]

    def contents(tensor: NewTensor) -> Iterator[bytes]:
        for chunk in chunks(checkpoint, infos[tensor.name]):
            bar.update(len(chunk))
            yield chunk

    (folder / DENSE).parent.mkdir()
    alignment = header.metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    with new_file(folder / DENSE) as file:
        write_gguf(file, entries, tensors, contents, alignment)


def _write_manifest(
    path: Path, checkpoint: Checkpoint, args: ModelArgs, entries: list[dict[str, Any]]
) -> None:
    """Write the manifest, last of all."""
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
