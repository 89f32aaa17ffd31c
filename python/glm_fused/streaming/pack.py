"""Writes a packed sidecar, a layer at a time, each in one step, so that packing can go on later.

A file is written under a name of the process's own and then renamed, so a process that is killed
leaves nothing half-written under a real name. One process at a time packs into a folder; where the
file system has no locks, two of them write the same bytes, each under names of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint.folder import Checkpoint
from ..checkpoint.progress import byte_bar
from ..checkpoint.safetensors_header import regular_file_size
from ..checkpoint.writing import check_space, new_file
from .sidecar import (
    LAYER_FILE,
    MANIFEST,
    PAGE,
    TEMPORARY,
    UNFINISHED,
    PackedLayer,
    Sidecar,
    header_page,
    layer_file,
    read_manifest,
    slab_bytes,
    write_manifest,
)
from .sidecar_identity import check_identity, checked_source, packed_slabs, set_id, shards
from .source import ExpertReader, ExpertSource, LayerExperts


def pack(
    checkpoint_path: str | os.PathLike[str],
    path: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Sidecar:
    """Pack the routed experts of a checkpoint into the folder ``path``; returns the sidecar.

    What an earlier run finished is compared with the checkpoint, byte by byte, and kept; a damaged
    file is packed again, which ``say`` is told. Raises ValueError for a folder that holds another
    checkpoint's sidecar, the checkpoint or other files, for one that another process packs into,
    and for checkpoints that do not load, have changed since or change meanwhile; OSError, naming
    the file, where reading or writing fails. What is finished by then stays.
    """
    checkpoint, source = checked_source(checkpoint_path)
    _check_folder(path, checkpoint.path)
    path.mkdir(parents=True, exist_ok=True)
    with _only_packer(path):
        _Packer(checkpoint, source, path, say).run()
    return Sidecar.open(path)


def _check_folder(path: Path, checkpoint: Path) -> None:
    """Refuse a folder with anything in it that packing would bury in its files."""
    if not path.is_dir():
        return
    folder = checkpoint.resolve()
    if any(path.samefile(p) for p in (folder, *folder.parents)):
        raise ValueError(
            f"[sidecar] {path} is or contains the checkpoint's own folder; choose another."
        )
    if (path / MANIFEST).exists() or (path / UNFINISHED).exists():
        return
    for file in sorted(path.iterdir()):
        name = file.name
        if not (name.startswith(".") or LAYER_FILE.fullmatch(name) or TEMPORARY.fullmatch(name)):
            raise ValueError(
                f"[sidecar] {path} holds {name!r} and no sidecar; choose an empty folder."
            )


@contextmanager
def _only_packer(path: Path) -> Iterator[None]:
    """Hold the folder's lock, and delete what killed processes left under names of their own."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"[sidecar] another process is packing into {path}; wait until it is done."
            ) from None
        except OSError:  # there are no locks here, so what lies around may be another packer's
            yield
            return
        for file in path.iterdir():
            if TEMPORARY.fullmatch(file.name):
                file.unlink()
        yield
    finally:
        os.close(folder)


class _Packer:
    """One run over one folder."""

    def __init__(
        self, checkpoint: Checkpoint, source: ExpertSource, path: Path, say: Callable[[str], None]
    ) -> None:
        self._checkpoint, self._source, self._path, self._say = checkpoint, source, path, say
        self._shards = shards(source)
        self._id = set_id(checkpoint, source)
        self._done: dict[int, PackedLayer] = {}

    def run(self) -> None:
        layers = self._source.layers
        finished = (self._path / MANIFEST).exists()
        known = self._known(MANIFEST if finished else UNFINISHED)
        with byte_bar("Packing", self._source.nbytes) as bar:
            for i in sorted(layers.keys() & known.keys()):
                self._keep(known[i], bar)
            left = {i: layer for i, layer in layers.items() if i not in self._done}
            _check_space(self._path, left)
            if left and not finished:
                self._write(UNFINISHED)
            for i in left:
                self._done[i] = self._pack_layer(i, bar)
                if not finished:
                    self._write(UNFINISHED)
        if shards(self._source) != self._shards:
            raise ValueError(
                f"[sidecar] {self._checkpoint.path} was written to while it was packed; pack again."
            )
        self._write(MANIFEST)
        (self._path / UNFINISHED).unlink(missing_ok=True)

    def _known(self, name: str) -> dict[int, PackedLayer]:
        """The layers that an earlier run wrote, as the manifest ``name`` has them."""
        if not (self._path / name).exists():
            return {}
        sidecar = read_manifest(self._path / name)
        check_identity(sidecar, self._checkpoint, self._id)
        return {layer.layer: layer for layer in sidecar.layers}

    def _write(self, name: str) -> None:
        layers = tuple(self._done[i] for i in sorted(self._done))
        write_manifest(Sidecar(self._path, self._id, self._shards, layers), name)

    def _keep(self, known: PackedLayer, bar: tqdm[Any]) -> None:
        """Keep a layer's file if it holds what would be packed now.

        Raises ValueError if it holds, undamaged, something else.
        """
        path = self._path / known.file
        try:
            found = regular_file_size(path)
        except FileNotFoundError:
            return self._say(f"{known.file} is missing and is packed again")
        if found != known.size:
            return self._say(f"{known.file} has {found} bytes, not {known.size}: packed again")
        with path.open("rb") as file:
            layer, same = self._stream(known.layer, lambda b: file.read(len(b)) == b, bar)
        if same:
            self._done[known.layer] = layer
            return None
        for e, (before, now) in enumerate(zip(known.checksums, layer.checksums, strict=False)):
            if before != now:
                raise ValueError(
                    f"[sidecar] {path} is not what {self._checkpoint.path} holds now: layer"
                    f" {known.layer}, expert {e} was another when it was packed; choose another"
                    " folder, or delete this one."
                )
        experts = self._source.layers[known.layer]
        bar.total += experts.experts * experts.expert_bytes
        return self._say(f"{known.file} is damaged and is packed again")

    def _pack_layer(self, number: int, bar: tqdm[Any]) -> PackedLayer:
        target = self._path / layer_file(number)
        try:
            with new_file(target) as out:
                layer, _ = self._stream(number, lambda block: out.write(block) == len(block), bar)
        except OSError as error:
            if error.filename is not None:  # it is of another file, such as the checkpoint's
                raise
            reason = os.strerror(error.errno or 0)
            raise OSError(
                error.errno, f"{reason}; finished layers are kept", str(target)
            ) from error
        return layer

    def _stream(
        self, number: int, take: Callable[[bytes], bool], bar: tqdm[Any]
    ) -> tuple[PackedLayer, bool]:
        """Hand out a layer's file in blocks; returns its entry and whether all were taken."""
        layer, digest, checksums = self._source.layers[number], hashlib.sha256(), []
        page = header_page(self._id, number)
        digest.update(page)
        taken = take(page)
        with ExpertReader(self._source) as reader:
            for slab, checksum in packed_slabs(layer, reader):
                digest.update(slab)
                taken = take(slab) and taken
                checksums.append(checksum)
                bar.update(layer.expert_bytes)
        entry = PackedLayer(number, digest.hexdigest(), layer.parts, tuple(checksums))
        return entry, taken


def _check_space(path: Path, layers: dict[int, LayerExperts]) -> None:
    needed = sum(PAGE + layer.experts * slab_bytes(layer.parts) for layer in layers.values())
    check_space(path, needed)
