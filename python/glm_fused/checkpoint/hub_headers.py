"""The headers of a model on the Hub, in files that look like its own but for the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..foreign import said
from .gguf_header import MAX_HEADER_BYTES as MAX_GGUF_BYTES
from .gguf_header import read_gguf_header
from .hub import Unreachable, explained
from .hub_names import HubName
from .paths import GGUF
from .safetensors_header import MAX_HEADER_BYTES

_FIRST = 128 << 10  # bytes of a file that are asked for at first; most headers are shorter
_AT_ONCE = 8  # files
_SAFETENSORS = ".safetensors"


def write_headers(name: HubName, commit: str, files: dict[str, int], folder: Path) -> Path:
    """Write a model of the Hub, but for its weights, into ``folder``; what it takes is headers.

    Its files have their sizes, with zeros that take no room on the disk where weights would be, so
    that what reads headers alone reads these.

    Args:
        name: which model.
        commit: of its repository.
        files: those of the model, with their bytes, as `glm_fused.checkpoint.hub_files` chose them.
        folder: an empty one.

    Returns:
        What stands for the model, a folder or a GGUF file. Raises as
        `glm_fused.checkpoint.hub.local_model` does, and ValueError for a header without an end.
    """
    from huggingface_hub import hf_hub_download

    weights = [file for file in files if file.endswith((GGUF, _SAFETENSORS))]
    with explained(name):
        for file in files:
            if file not in weights:
                kept = hf_hub_download(name.repository, file, revision=commit)
                shutil.copyfile(kept, folder / file)

        def write(file: str) -> None:
            _write(name, file, files[file], folder, lambda n: _first(name, commit, file, n))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(write, weights))
    models = [file for file in weights if file.endswith(GGUF)]
    return folder / models[0] if models else folder


def _write(
    name: HubName, file: str, size: int, folder: Path, first: Callable[[int], bytes]
) -> None:
    """Write a file with its header; ``first`` gives so many of its bytes, or all."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    known = first(min(_FIRST, size))
    if file.endswith(_SAFETENSORS):
        length = 8 + int.from_bytes(known[:8], "little")
        if length > 8 + MAX_HEADER_BYTES:
            raise ValueError(f"[hub] {name}: {file} is no safetensors file: its header has no end.")
        if length > len(known) < size:
            known = first(min(length, size))
    _sparse(path, known, size)
    while file.endswith(GGUF) and len(known) < min(size, MAX_GGUF_BYTES):
        try:
            read_gguf_header(path)
            return
        except ValueError:  # zeros may be where more of it has to be
            known = first(min(8 * len(known), size, MAX_GGUF_BYTES))
            _sparse(path, known, size)


def _sparse(path: Path, data: bytes, size: int) -> None:
    with path.open("wb") as out:
        out.write(data)
        out.truncate(size)


def _first(name: HubName, commit: str, file: str, n: int) -> bytes:
    """The first ``n`` bytes of a file of the Hub."""
    from huggingface_hub import get_session, hf_hub_url, utils

    url = hf_hub_url(name.repository, file, revision=commit)
    headers: dict[str, str] = utils.build_hf_headers()  # type: ignore[attr-defined]
    headers |= {"Range": f"bytes=0-{n - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        if response.status_code >= 400:
            response.read()
        utils.hf_raise_for_status(response)  # type: ignore[attr-defined]
        if response.status_code != 206:
            raise Unreachable(f"[hub] {name}: {file}: the Hub gives no ranges of bytes.")
        data = bytes(response.read())
    if len(data) != n:
        found = said(ValueError(f"{len(data)} bytes came, expected {n}"))
        raise Unreachable(f"[hub] {name}: {file}: {found}.")
    return data
