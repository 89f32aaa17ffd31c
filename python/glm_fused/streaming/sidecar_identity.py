"""Whether a sidecar holds the experts of the checkpoint at hand, and how that is known.

- **Packing** reads every byte, and notes size and time of modification of the shards it read. When
  it runs again, it compares every byte once more: it keeps what is right, packs what is damaged,
  refuses experts that have changed, and notes the state of the shards anew.
- **Loading** (`sidecar_source`) checks what can be checked in a second, and all of it must hold:

  1. the manifest describes the experts exactly as the checkpoint's headers do: layers, number of
     experts, names, order, types and shapes of their tensors;
  2. the identity is the same: those headers and the whole contents of all routers;
  3. the shards that hold experts are those of the last packing, by name, size and time of
     modification. A copy that got a new time is refused until packing has compared it;
  4. times can lie (archives and stores that set them all alike), so of every expert a block of
     4 KiB is compared, tensors in turn: a fine-tune changes every one of them, but for single
     numbers, which are left out.

- **Reading** an expert checks its own checksum.
- ``glm-fused sidecar verify --model`` compares every byte and changes nothing.

So what loads is the checkpoint's, unless a shard was edited outside the sampled blocks and then
given its old time back. Only the last command and packing notice that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path

from .. import _ext
from ..checkpoint.checked import checked
from ..checkpoint.folder import Checkpoint
from ..models.config import ModelArgs
from ..validation import show
from .flashmoe import FlashMoeSidecar
from .sidecar import ALL, MANIFEST, PAGE, PackedLayer, Shards, Sidecar, slab_bytes
from .source import ExpertReader, ExpertSource, LayerExperts, Part, checkpoint_source

SAMPLE = 4096
_CHUNK = 1 << 20
_READERS = 16


def sidecar_source(
    path: Path, checkpoint: Checkpoint, args: ModelArgs, layers: Container[int] = ALL
) -> ExpertSource:
    """The experts of some layers of a sidecar that was packed from this checkpoint.

    Of other layers neither files nor experts are looked at, but for their routers.

    Raises what ``Sidecar.open`` raises, ValueError for another checkpoint's sidecar, naming what
    differs, and OSError, naming the file, where reading fails.
    """
    sidecar = Sidecar.open(path, layers)
    source = checkpoint_source(checkpoint, args, args.layers)
    check_described(sidecar, checkpoint, source)
    changed = changed_shards(sidecar, source)
    if changed:
        raise ValueError(f"[sidecar] {path} {changed}.")
    packed = sidecar.source().of_layers(layers)
    check_sample(path, packed, source)
    return packed


def flashmoe_source(
    path: Path, checkpoint: Checkpoint, args: ModelArgs, layers: Container[int] = ALL
) -> ExpertSource:
    """The experts of some layers of a Flash-MoE sidecar.

    ``checkpoint`` is what `with_experts` made.

    Where the model's own file has the experts too, a block of each is compared. Raises what opening
    the sidecar raises, and ValueError, naming the expert, for one that differs.
    """
    sidecar = FlashMoeSidecar.open(path)
    source = sidecar.source(args).of_layers(layers)
    infos = [checkpoint.tensors[name] for name in sidecar.tensors()]
    if all(info.file in checkpoint.files for info in infos):
        same = [layer for layer in args.model_layers if layer.index in source.layers]
        check_sample(path, source, checkpoint_source(checkpoint, args, same))
    return source


def checked_source(path: str | os.PathLike[str]) -> tuple[Checkpoint, ExpertSource]:
    """Open a checkpoint, compare its headers with its config as loading does, find its experts.

    Raises ValueError for a checkpoint without routed experts, and whatever loading raises.
    """
    checkpoint = Checkpoint.open(path)
    args, _ = checked(checkpoint)
    source = checkpoint_source(checkpoint, args, args.layers)
    if not source.layers:
        raise ValueError(f"[sidecar] {checkpoint.path} has no routed experts.")
    return checkpoint, source


def check_described(sidecar: Sidecar, checkpoint: Checkpoint, source: ExpertSource) -> None:
    """Raise ValueError unless the manifest is of this checkpoint, as far as headers tell."""
    check_identity(sidecar, checkpoint, set_id(checkpoint, source))
    _check_layers(sidecar, checkpoint, source)


def set_id(checkpoint: Checkpoint, source: ExpertSource) -> str:
    """A digest of the experts' headers and the routers' contents."""
    digest = hashlib.sha256()
    files = {path.name: i for i, path in enumerate(source.files)}
    with ExpertReader(source) as reader:
        for i, layer in source.layers.items():
            digest.update(repr((i, layer.experts, layer.parts)).encode())
            for leaf in ("weight", "e_score_correction_bias"):
                info = checkpoint.tensors[f"model.layers.{i}.mlp.gate.{leaf}"]
                for at in range(info.start, info.end, _CHUNK):
                    nbytes = min(_CHUNK, info.end - at)
                    digest.update(reader.read(files[info.file], at, nbytes))
    return digest.hexdigest()[:32]


def check_identity(sidecar: Sidecar, checkpoint: Checkpoint, expected: str) -> None:
    """Raise ValueError for a sidecar of other routers or of experts of another form."""
    if sidecar.set_id != expected:
        raise ValueError(
            f"[sidecar] {sidecar.path} was packed from a checkpoint with id {sidecar.set_id}, but"
            f" {checkpoint.path} has {expected}; choose another folder."
        )


def _check_layers(sidecar: Sidecar, checkpoint: Checkpoint, source: ExpertSource) -> None:
    """Raise ValueError unless the manifest describes the checkpoint's experts."""
    found, expected = [layer.layer for layer in sidecar.layers], sorted(source.layers)
    if found != expected:
        raise ValueError(
            f"[sidecar] {sidecar.path} has layers {show(found)}, but {checkpoint.path} has experts"
            f" in {show(expected)}."
        )
    for packed in sidecar.layers:
        layer = source.layers[packed.layer]
        if len(packed.checksums) != layer.experts:
            raise ValueError(
                f"[sidecar] {sidecar.path}: layer {packed.layer} has {len(packed.checksums)}"
                f" experts, but {checkpoint.path} has {layer.experts}."
            )
        if packed.parts != layer.parts:
            mine, its = _first_difference(packed.parts, layer.parts)
            raise ValueError(
                f"[sidecar] {sidecar.path}: layer {packed.layer} has {_shown(mine)} where"
                f" {checkpoint.path} has {_shown(its)}."
            )


def _first_difference(
    mine: tuple[Part, ...], its: tuple[Part, ...]
) -> tuple[Part | None, Part | None]:
    for a, b in zip(mine, its, strict=False):
        if a != b:
            return a, b
    longer, same = max(mine, its, key=len), min(len(mine), len(its))
    return (longer[same], None) if longer is mine else (None, longer[same])


def _shown(part: Part | None) -> str:
    return "nothing more" if part is None else f"{part.name} {part.dtype} {show(list(part.shape))}"


def shards(source: ExpertSource) -> Shards:
    """The present state of the files that hold experts."""
    used = {file for layer in source.layers.values() for file, _ in layer.locations}
    states = {}
    for i, path in enumerate(source.files):
        if i in used:
            status = path.stat()
            states[path.name] = status.st_size, status.st_mtime_ns
    return states


def changed_shards(sidecar: Sidecar, source: ExpertSource) -> str:
    """Say, in part of a sentence, which shard is not in the state that packing saw; else ""."""
    present = shards(source)
    if present == sidecar.shards:
        return ""
    names = sorted(present.keys() | sidecar.shards.keys())
    name = next(name for name in names if present.get(name) != sidecar.shards.get(name))
    found, packed = present.get(name), sidecar.shards.get(name)
    if found is None or packed is None:
        what = "was not packed from" if packed is None else "was packed from a file that is gone,"
        what = f"{what} {name!r}"
    elif found[0] != packed[0]:
        what = f"was packed from {name!r} of {packed[0]} bytes, which has {found[0]} now"
    else:
        what = (
            f"was packed before {name!r} was written or copied (at {packed[1]} ns, now {found[1]})"
        )
    return f"{what}; `glm-fused sidecar import` again compares everything and keeps what is right"


def check_sample(path: Path, packed: ExpertSource, source: ExpertSource) -> None:
    """Compare a block of every packed expert; raises ValueError, naming the first that differs."""

    def check(layer: int) -> str:
        with ExpertReader(source) as theirs, ExpertReader(packed) as ours:
            experts = source.layers[layer], packed.layers[layer]
            for e in range(experts[0].experts):
                name, nbytes, *places = _sample(layer, e, *experts)
                if theirs.read(*places[0], nbytes) != ours.read(*places[1], nbytes):
                    return f"layer {layer}, expert {e}: {name}"
        return ""

    with ThreadPoolExecutor(_READERS) as pool:
        for wrong in pool.map(check, packed.layers):
            if wrong:
                raise ValueError(
                    f"[sidecar] {path}: {wrong} is not the checkpoint's (a fine-tune of what it"
                    " was made from, or damaged); `glm-fused sidecar verify --model` says which."
                )


def _sample(
    layer: int, expert: int, theirs: LayerExperts, ours: LayerExperts
) -> tuple[str, int, tuple[int, int], tuple[int, int]]:
    """A part's name, the bytes of a block and where it begins in both; spread over the parts."""
    tensors = [i for i, part in enumerate(theirs.parts) if part.shape]
    i = tensors[(layer + expert) % len(tensors)]
    part, (file, at), (my_file, my_at) = (
        theirs.parts[i],
        theirs.of_expert(expert)[i],
        ours.of_expert(expert)[i],
    )
    nbytes = min(SAMPLE, part.nbytes)
    # The multiples of this constant are Weyl's sequence, in which neighbours lie far apart.
    skip = (layer * 256 + expert) * 0x9E3779B1 % 2**32 * (part.nbytes - nbytes) >> 32
    return part.name, nbytes, (file, at + skip), (my_file, my_at + skip)


def packed_slabs(layer: LayerExperts, reader: ExpertReader) -> Iterator[tuple[bytes, int]]:
    """Every expert of a layer as packing writes it, with its checksum."""
    padding = bytes(slab_bytes(layer.parts) - layer.expert_bytes)
    for e in range(layer.experts):
        parts = reader.expert(layer, e)
        yield b"".join([*parts, padding]), _ext.checksum(parts)


def verify(sidecar: Sidecar, source: ExpertSource | None = None) -> Iterator[tuple[str, str]]:
    """Read every file; yields its name and what is wrong with it, or "".

    With the ``source`` of a checkpoint, which ``check_described`` has to have passed, every byte is
    compared with its experts. Then the manifest's name comes first, with which of its shards is not
    in the state that packing noted. Raises OSError, naming the file, where reading fails.
    """
    if source is not None:
        yield MANIFEST, changed_shards(sidecar, source)
    for layer in sidecar.layers:
        yield layer.file, "; ".join(_problems(sidecar, layer, source))


def _problems(sidecar: Sidecar, layer: PackedLayer, source: ExpertSource | None) -> Iterator[str]:
    digest, damaged, different = hashlib.sha256(), [], []
    with ExitStack() as stack:
        file = stack.enter_context((sidecar.path / layer.file).open("rb"))
        theirs: Iterator[tuple[bytes, int]] | None = None
        if source is not None:
            reader = stack.enter_context(ExpertReader(source))
            theirs = packed_slabs(source.layers[layer.layer], reader)
        digest.update(file.read(PAGE))
        for e, checksum in enumerate(layer.checksums):
            slab = file.read(layer.slab)
            digest.update(slab)
            if _ext.checksum(_cut(slab, layer.parts)) != checksum:
                damaged.append(e)
            if theirs is not None and slab != next(theirs)[0]:
                different.append(e)
        digest.update(file.read())
    if digest.hexdigest() != layer.sha256:
        yield f"SHA-256 {digest.hexdigest()}, expected {layer.sha256}"
    if damaged:
        yield f"experts {show(damaged)} do not have their checksums"
    if different:
        yield f"experts {show(different)} are not the checkpoint's"


def _cut(slab: bytes, parts: tuple[Part, ...]) -> list[bytes]:
    ends = list(accumulate((part.nbytes for part in parts), initial=0))
    return [slab[a:b] for a, b in pairwise(ends)]
