"""Which checkpoint a user means by a path."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

DEMO = "demo"
GGUF = ".gguf"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS = (SINGLE_FILE, INDEX_FILE)
_LATER_SHARD = re.compile(r".+-(?!00001)[0-9]{5}-of-[0-9]{5}\.gguf", re.IGNORECASE)


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that ``path`` names: a folder with a config.json, or a GGUF file.

    "demo" is the bundled model, unless there is a ./demo: what exists keeps its meaning. A folder
    without safetensors stands for the one GGUF model in it, and a model in shards goes by the first
    of them. Raises FileNotFoundError or ValueError, saying what was found and what may be meant,
    for anything else.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("[checkpoint] the path is empty, expected a checkpoint's.")
    found = Path(text).expanduser()
    if text == DEMO and not found.exists():
        return bundled_folder()
    if not found.exists():
        raise FileNotFoundError(
            f"[checkpoint] {text} does not exist; models are read from local files."
            f"{_repository_hint(text)}"
        )
    if not found.is_dir():
        return _gguf_file(found, text)
    if any((found / name).exists() for name in WEIGHTS):
        return _with_config(found, text)
    return _gguf_in(found, text) or _with_config(found, text)


def _gguf_file(file: Path, text: str) -> Path:
    if file.suffix.lower() != GGUF:
        raise ValueError(
            f"[checkpoint] {text} is a file, expected the folder of a checkpoint or a {GGUF} file."
        )
    return file


def _gguf_in(folder: Path, text: str) -> Path | None:
    """The first file of the GGUF model in a folder; None where there is none."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() == GGUF)
    except OSError:
        return None
    models = [file for file in files if not _LATER_SHARD.fullmatch(file.name)] or files[:1]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise ValueError(f"[checkpoint] {text} has several GGUF models, name one of them: {names}.")
    return models[0] if models else None


def _with_config(folder: Path, text: str) -> Path:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"[checkpoint] {text} has no config.json, so it is no folder of a checkpoint."
            f"{_folder_hint(folder, text)}"
        )
    return folder


def bundled_folder() -> Path:
    """The checkpoint that comes with the package.

    Raises FileNotFoundError where the package was built without it.
    """
    folder = Path(str(resources.files("glm_fused") / "demo_model"))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing; reinstall glm-fused.")
    return folder


def _repository_hint(text: str) -> str:
    """How to download what looks like a repository's name."""
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        return ""
    return f" To download it: hf download {text} --local-dir {text.rpartition('/')[2]}"


def _folder_hint(folder: Path, text: str) -> str:
    """What a folder without a config.json looks like."""
    if text == DEMO:
        return " The bundled model has this name only where there is no such folder."
    try:
        inside = sorted(folder.iterdir())
        snapshots = sorted(folder.glob("snapshots/*/config.json"))
        below = sorted(folder.glob("*/config.json"))
    except OSError as error:
        return f" It cannot be listed: {error.strerror}."
    if snapshots:
        return f" It is a cache of the Hugging Face Hub; the model is {snapshots[-1].parent}"
    if below:
        return f" Its folder {below[0].parent} has one."
    return "" if inside else " It is empty."
