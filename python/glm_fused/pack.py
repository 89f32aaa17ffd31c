"""Writes a packed sidecar: a layer at a time, each in one step, so that packing can go on later."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from . import _ext
from .budget import size
from .checkpoint import Checkpoint
from .config import args_from_config
from .expert_source import ExpertSource, LayerExperts, checkpoint_source
from .formats import quantization_from_config
from .manifest import check_tensors
from .sidecar import (
    MANIFEST,
    PAGE,
    UNFINISHED,
    PackedLayer,
    Sidecar,
    header_page,
    layer_file,
    read_manifest,
    set_id,
    slab_bytes,
    write_manifest,
)


def pack(checkpoint_path: str | os.PathLike[str], path: Path) -> Sidecar:
    """Pack the routed experts of a checkpoint into the folder ``path``; returns the sidecar.

    Layers that an earlier run finished are kept. Raises ValueError for a folder that holds another
    checkpoint's sidecar and for checkpoints that do not load, OSError, naming the file, where
    writing fails; what is finished by then stays.
    """
    checkpoint = Checkpoint.open(checkpoint_path)
    args = args_from_config(checkpoint.config)
    check_tensors(args, quantization_from_config(checkpoint.config), checkpoint.tensors)
    source, identity = checkpoint_source(checkpoint, args), set_id(checkpoint, args)
    if not source.layers:
        raise ValueError(f"[sidecar] {checkpoint.path} has no routed experts.")
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST).exists():
        _check_set(path / MANIFEST, identity)
        return Sidecar.open(path)
    done = _finished(path, identity)
    left = {i: layer for i, layer in source.layers.items() if i not in done}
    _check_space(path, left)
    with _progress(left) as bar:
        for i, layer in left.items():
            done[i] = _pack_layer(source, i, layer, path, identity, bar)
            _write(path / UNFINISHED, identity, done)
    _write(path / MANIFEST, identity, done)
    (path / UNFINISHED).unlink(missing_ok=True)
    return Sidecar.open(path)


def _check_set(manifest: Path, identity: str) -> Sidecar:
    sidecar = read_manifest(manifest)
    if sidecar.set_id != identity:
        raise ValueError(
            f"[sidecar] {manifest} is of another checkpoint (id {sidecar.set_id}, expected"
            f" {identity}); choose another folder."
        )
    return sidecar


def _finished(path: Path, identity: str) -> dict[int, PackedLayer]:
    """Layers of an earlier run whose files are whole."""
    if not (path / UNFINISHED).exists():
        return {}
    sidecar = _check_set(path / UNFINISHED, identity)
    done = {}
    for layer in sidecar.layers:
        try:
            sidecar.check_file(layer)
        except (ValueError, FileNotFoundError):
            continue
        done[layer.layer] = layer
    return done


def _check_space(path: Path, layers: dict[int, LayerExperts]) -> None:
    needed = sum(PAGE + layer.experts * slab_bytes(layer.parts) for layer in layers.values())
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ValueError(f"[sidecar] {path}: {size(needed)} needed, {size(free)} free.")


def _pack_layer(
    source: ExpertSource,
    number: int,
    layer: LayerExperts,
    path: Path,
    identity: str,
    bar: tqdm[Any],
) -> PackedLayer:
    target = path / layer_file(number)
    temporary = target.with_name(target.name + ".tmp")
    digest, checksums = hashlib.sha256(), []
    try:
        with temporary.open("wb") as out, ExitStack() as stack:
            paths, used = list(source.files), {file for file, _ in layer.locations}
            files = {i: stack.enter_context(paths[i].open("rb", buffering=0)) for i in used}
            blocks = [header_page(identity, number)]
            for e in range(layer.experts):
                parts = _read_expert(files, layer, e)
                checksums.append(_ext.checksum(parts))
                padding = bytes(slab_bytes(layer.parts) - layer.expert_bytes)
                blocks += [*parts, padding]
                for block in blocks:
                    digest.update(block)
                    out.write(block)
                bar.update(layer.expert_bytes)
                blocks = []
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{os.strerror(error.errno or 0)}; finished layers are kept", str(target)
        ) from error
    total = PAGE + layer.experts * slab_bytes(layer.parts)
    return PackedLayer(number, total, digest.hexdigest(), layer.parts, tuple(checksums))


def _read_expert(files: Mapping[int, BinaryIO], layer: LayerExperts, expert: int) -> list[bytes]:
    parts = []
    first = expert * len(layer.parts)
    for part, (file, offset) in zip(layer.parts, layer.locations[first:], strict=False):
        data = bytearray()
        while len(data) < part.nbytes:
            block = os.pread(files[file].fileno(), part.nbytes - len(data), offset + len(data))
            if not block:
                raise ValueError(
                    f"[sidecar] {files[file].name} ends before byte {offset + part.nbytes}."
                )
            data += block
        parts.append(bytes(data))
    return parts


def _write(manifest: Path, identity: str, done: dict[int, PackedLayer]) -> None:
    write_manifest(manifest, identity, (done[i] for i in sorted(done)))


def _progress(layers: dict[int, LayerExperts]) -> tqdm[Any]:
    return tqdm(
        total=sum(layer.experts * layer.expert_bytes for layer in layers.values()),
        desc="Packing",
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    )
