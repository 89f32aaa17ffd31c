"""A checkpoint: its config and the headers of its shards. Nothing here reads tensor data."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.tensor_names import release_name
from ..validation import show
from .gguf_file import open_gguf
from .paths import INDEX_FILE, SINGLE_FILE, checkpoint_path
from .safetensors_header import (
    TensorInfo,
    parse_json_object,
    quoted,
    read_header,
    regular_file_size,
)

DECLARATION_FILE = "hf_quant_config.json"
MAX_JSON_BYTES = 100_000_000
_UNLISTED = ("weight_scale", "weight_scale_2", "input_scale")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint contains, validated as far as its headers tell.

    ``config`` is config.json, with ``eos_token_id`` of generation_config.json when that has one and
    ``hf_quant_config`` of the file of that name where it applies: config.json declares no
    quantization, and there are tensors that modelopt would have scaled.
    ``files`` gives each shard's size in bytes, ``tensors`` every tensor by the name that it has in
    the release.

    ``path`` is a folder or the first file of a GGUF model, which has ``metadata``: then ``config``
    is made of that, and ``tensors`` have the model's names (`glm_fused.checkpoint.gguf_names`).
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, int]
    tensors: dict[str, TensorInfo]
    metadata: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Checkpoint":
        """Read configs, index and headers; ``path`` is what `glm_fused.checkpoint.paths` takes.

        Raises FileNotFoundError for a missing folder, config or shard and ValueError, naming the
        file and tensor, for anything malformed or inconsistent.
        """
        path = checkpoint_path(path)
        if not path.is_dir():
            gguf = open_gguf(path)
            return cls(path, gguf.config, gguf.files, gguf.tensors, gguf.metadata)
        config = _read_config(path)
        index = path / INDEX_FILE
        if index.exists():
            tensors = _read_shards(path, weight_map_of(index))
        elif (path / SINGLE_FILE).exists():
            tensors = read_header(path / SINGLE_FILE)
        else:
            raise FileNotFoundError(
                f"[checkpoint] {path} has neither {SINGLE_FILE} nor {INDEX_FILE}."
            )
        if not tensors:
            raise ValueError(f"[checkpoint] {path} has no tensors.")
        if any(name.endswith(".weight_scale") for name in tensors):
            _read_declaration(path, config)
        tensors = _with_release_names(path, config, tensors)
        names = dict.fromkeys(info.file for info in tensors.values())
        files = {name: (path / name).stat().st_size for name in names}
        return cls(path, config, files, tensors)

    @property
    def folder(self) -> Path:
        """The folder that ``files`` are in."""
        return self.path if self.metadata is None else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def _with_release_names(
    path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors, and the config's entries of modules, under the names of the release.

    Raises ValueError, naming the tensor, for two of one name.
    """
    layers = config.get("num_hidden_layers")
    if type(layers) is not int:
        return tensors
    renamed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if (ours := release_name(name, layers)) in renamed:
            raise ValueError(f"[checkpoint] {path}: two tensors are {quoted(ours)}.")
        renamed[ours] = info
    if isinstance(entries := config.get("quantization"), dict):
        config["quantization"] = {release_name(k, layers): v for k, v in entries.items()}
    return renamed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file; errors name the file."""
    size = regular_file_size(path)
    if size > MAX_JSON_BYTES:
        raise ValueError(f"[checkpoint] {path}: {size} bytes, expected at most {MAX_JSON_BYTES}.")
    return parse_json_object(path.read_bytes(), f"[checkpoint] {path}")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    generation = path / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    if (eos := config.get("eos_token_id")) is not None:
        ids = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(
                f"[checkpoint] {path}: eos_token_id must be token ids, found {show(eos)}."
            )
    return config


def _read_declaration(path: Path, config: dict[str, Any]) -> None:
    """Take the quantization from the file that modelopt writes where config.json has none.

    The file may lie beside weights that it is not of, such as those that were dequantized.
    """
    file = path / DECLARATION_FILE
    declared = any(config.get(key) is not None for key in ("quantization", "quantization_config"))
    if declared or not file.exists():
        return
    entry = read_json(file).get("quantization")
    if not isinstance(entry, dict):
        raise ValueError(f"[checkpoint] {file}: quantization {show(entry)}, expected an object.")
    config["hf_quant_config"] = {"quant_method": "modelopt"} | entry


def weight_map_of(index: Path) -> dict[str, str]:
    """The file of each tensor, as an untrusted index has it; raises ValueError, naming it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"[checkpoint] {index}: weight_map must name tensors and their files.")
    checked: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in checked:
            continue
        plain = isinstance(file, str) and file.endswith(".safetensors")
        if not plain or len(file) > 255 or any(c in file for c in "/\\:\0"):
            raise ValueError(
                f"[checkpoint] {index}: tensor {quoted(name)} is in {show(file)}, expected the"
                " plain name of a .safetensors file in the same folder."
            )
        checked.add(file)
    return weight_map


def _read_shards(path: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (path / file).exists():
            count = sum(1 for f in weight_map.values() if f == file)
            raise FileNotFoundError(
                f"[checkpoint] {path / file} is missing; {INDEX_FILE} puts {count} tensors there."
            )
        for name, info in read_header(path / file).items():
            if name in tensors:
                raise ValueError(
                    f"[checkpoint] {path}: tensor {quoted(name)} is in both {tensors[name].file}"
                    f" and {file}."
                )
            if weight_map.get(name) != file and not _scales_of_listed(name, file, weight_map):
                raise ValueError(
                    f"[checkpoint] {path / file}: tensor {quoted(name)} is here, but {INDEX_FILE}"
                    f" has it in {show(weight_map.get(name))}."
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"[checkpoint] {path / file}: tensor {quoted(name)} is missing; {INDEX_FILE} has it"
                " here."
            )
    return tensors


def _scales_of_listed(name: str, file: str, weight_map: dict[str, str]) -> bool:
    """Whether a tensor that the index leaves out is a scale of a weight that it has in the file.

    One of modelopt's scripts, for DeepSeek and GLM-5, writes scales and keeps the index as it was.
    """
    module, _, leaf = name.rpartition(".")
    listed = weight_map.get(f"{module}.weight") == file
    return name not in weight_map and leaf in _UNLISTED and listed
