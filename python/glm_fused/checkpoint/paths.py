"""Which folder a user means by the path of a checkpoint."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

DEMO = "demo"


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint that ``path`` names; "demo" is the bundled model.

    A folder ./demo goes before the bundled model: what exists keeps its meaning. Raises
    FileNotFoundError or ValueError, saying what was found and what may be meant, for a path that is
    no folder with a config.json.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("[checkpoint] the path is empty, expected the folder of a checkpoint.")
    folder = Path(text).expanduser()
    if text == DEMO and not folder.exists():
        return bundled_folder()
    if not folder.exists():
        raise FileNotFoundError(
            f"[checkpoint] {text} does not exist; models are read from local folders."
            f"{_repository_hint(text)}"
        )
    if not folder.is_dir():
        raise ValueError(
            f"[checkpoint] {text} is a file, expected the folder of a checkpoint."
            f"{_gguf_hint([folder])}"
        )
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
    if not inside:
        return " It is empty."
    return _gguf_hint(inside)


def _gguf_hint(files: list[Path]) -> str:
    if any(file.suffix.lower() == ".gguf" for file in files):
        return " GGUF files are not read: take the safetensors of the same model."
    return ""
