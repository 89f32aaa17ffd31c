"""A checkpoint's tensors as arrays, whose bytes are those in its files and read when needed."""

import json
import resource
from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx

from .. import _ext
from ..formats.weights import plane_shape
from ..models.config import ModelArgs
from ..models.tensor_names import release_name, unused
from ..models.tensors import modules
from .folder import Checkpoint
from .gguf_formats import format_of
from .parts import Headers, join_pieces, split_headers, stored_rows
from .safetensors_header import NAMES


def read_lazily(
    checkpoint: Checkpoint, args: ModelArgs, parts: Mapping[str, slice] | None = None
) -> dict[str, mx.array]:
    """The tensors of a checkpoint, each of which is read when it is first evaluated.

    Blocks of GGUF are uint8 [..., n, bytes of a row]; what the model does not use of it is left
    out. With ``parts`` so it is of other files, and of the modules that these name only some are
    read, along the shard axis.

    Raises ValueError, naming the file, for one that cannot be opened, and naming the tensor for one
    whose part cannot be read by itself.
    """
    allow_open_files(len(checkpoint.files))
    headers = None if checkpoint.metadata is None else _gguf_headers(checkpoint, args)
    pieces: dict[str, list[list[str]]] = {}
    if parts is not None:
        headers = _headers(checkpoint, args) if headers is None else headers
        headers, pieces = split_headers(headers, stored_rows(checkpoint, args, parts))
    weights: dict[str, mx.array] = {}
    for file in checkpoint.files:
        path = str(checkpoint.folder / file)
        try:
            found = mx.load(path) if headers is None else _load(path, headers[file])
        except RuntimeError as error:
            raise ValueError(f"[loader] {path}: {error}") from None
        for name, array in cast(dict[str, mx.array], found).items():
            weights[release_name(name, args.num_hidden_layers)] = array
    join_pieces(weights, pieces)
    if checkpoint.metadata is not None:
        _convert_norms(weights, args)
    return weights


def _headers(checkpoint: Checkpoint, args: ModelArgs) -> Headers:
    """The headers of a checkpoint's files, of the tensors that the model uses."""
    headers: Headers = {file: {} for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        if not unused(name, args):
            headers[info.file][name] = {
                "dtype": info.dtype,
                "shape": info.shape,
                "data_offsets": [info.start, info.end],
            }
    return headers


def _gguf_headers(checkpoint: Checkpoint, args: ModelArgs) -> Headers:
    """The headers that GGUF files would have as safetensors, of the tensors that the model uses."""
    headers: Headers = {file: {} for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        fmt = format_of(info.dtype)
        elsewhere = info.file not in headers  # in a sidecar, whose experts are streamed
        if fmt is None or elsewhere or unused(name, args):
            continue
        plane = fmt.planes[0]
        shape = info.shape if fmt.mode == "dense" else plane_shape(fmt, plane, info.shape)
        headers[info.file][name] = {
            "dtype": NAMES[plane.dtypes[0]],
            "shape": shape,
            "data_offsets": [info.start, info.end],
        }
    return headers


def _load(path: str, header: dict[str, Any]) -> dict[str, mx.array]:
    return _ext.load_with_header(path, json.dumps(header)) if header else {}


def _convert_norms(weights: dict[str, mx.array], args: ModelArgs) -> None:
    """Bring norms, which GGUF has in float32, to the type of the activations, in place.

    That is the type of the embedding or, where it is packed, bfloat16, as norms are released.
    """
    embedding = weights["model.embed_tokens.weight"].dtype
    activations = mx.bfloat16 if embedding == mx.uint8 else embedding
    for module in modules(args):
        if module.kind == "norms":
            names = ["weight"] if module.bias is None else ["weight", module.bias[0]]
            for name in (f"{module.path}.{leaf}" for leaf in names):
                weights[name] = weights[name].astype(activations)


def allow_open_files(count: int) -> None:
    """Raise the limit of open files: lazy arrays keep theirs open, and macOS allows only 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
