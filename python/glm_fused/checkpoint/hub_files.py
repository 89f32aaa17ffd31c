"""Which files of a repository a model is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .folder import weight_map_of
from .hub_names import HubName
from .paths import GGUF, INDEX_FILE, SINGLE_FILE

_SHOWN = 20
_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
# Besides weights: configs, the chat template, and what tokenizers read; none of it in folders.
_SMALL = re.compile(r"[^/]+\.(json|jinja|model|tiktoken)|(vocab|merges)\.txt", re.IGNORECASE)


def files_of(
    name: HubName, files: Mapping[str, int], fetch: Callable[[str], Path]
) -> dict[str, int]:
    """The files that the model needs, in order, with their bytes.

    Args:
        name: which model it is; without a variant safetensors come first.
        files: those of the repository, with their bytes.
        fetch: gives the path of one that has to be read to know.

    Raises FileNotFoundError for files that the index names and ``files`` lack, and ValueError where
    there is no model, or several.
    """
    small = sorted(file for file in files if _SMALL.fullmatch(file))
    if name.variant is None and (INDEX_FILE in files or SINGLE_FILE in files):
        weights = [SINGLE_FILE]
        if INDEX_FILE in files:
            weights = sorted(set(weight_map_of(fetch(INDEX_FILE)).values()))
        if missing := [file for file in weights if file not in files]:
            raise FileNotFoundError(
                f"[hub] {name}: {len(missing)} of {len(weights)} files of weights are missing,"
                f" {missing[0]} among them."
            )
        return {file: files[file] for file in (*small, *weights)}
    return {file: files[file] for file in _gguf_model(name, files)}


def gguf_files(files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each GGUF model, in order, by what their names have in common."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(GGUF):
            models.setdefault(_SHARD.sub("", file[: -len(GGUF)]), []).append(file)
    return models


def _gguf_model(name: HubName, files: Iterable[str]) -> list[str]:
    models = gguf_files(files)
    if not models:
        found = "no GGUF files" if name.variant else "neither safetensors nor GGUF files"
        raise ValueError(f"[hub] {name.repository} has {found}, so no model that can be run here.")
    wanted = list(models)
    if name.variant is not None:
        part = re.compile(rf"(?<![A-Z0-9]){re.escape(name.variant)}(?![A-Z0-9_])", re.IGNORECASE)
        wanted = [model for model in models if part.search(model.rpartition("/")[2])]
    if len(wanted) == 1:
        return models[wanted[0]]
    names = [model.rpartition("/")[2] for model in wanted or models]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    count = f"{len(wanted)} GGUF models" if wanted else f"no GGUF model {name.variant}"
    raise ValueError(
        f"[hub] {name.repository} has {count}, expected one that is named as"
        f" {name.repository}:VARIANT of {', '.join(names[:_SHOWN])}{more}."
    )
