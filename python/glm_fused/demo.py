"""``glm-fused demo``: the bundled checkpoint continues some Python, on both paths."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

ABOUT = """\
An 8 M parameter model of GLM-5.2's shape (experts, sparse attention, shared indexers), trained on
Python's standard library: it shows that the kernels work, and is not good for anything else."""

PROMPT = '''\
import os
import json


def read_config(path, default=None):
    """Read a JSON file and return its contents as a dictionary."""
    if not os.path.exists(path):
        if default is None:
            raise FileNotFoundError(path)
        return default
    with open(path, "r", encoding="utf-8") as f:
        data = json.load(f)
    if not isinstance(data, dict):
        raise TypeError("expected a dictionary, got %r" % type(data))
    return data


def write_config(path, data):
    """Write the dictionary'''


def checkpoint_folder() -> Path:
    """The checkpoint that comes with the package.

    Raises FileNotFoundError where the package was built without it.
    """
    folder = Path(str(resources.files("glm_fused") / "demo_model"))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing; reinstall glm-fused.")
    return folder
