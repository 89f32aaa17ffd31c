"""Makes of the bundled model one that stock mlx-lm can load: with an indexer on every layer.

mlx-lm 0.32.2 has GLM-5 and 5.1, whose layers all run an indexer of their own. Here each layer that
shares a selection gets a copy of the indexer that made it. Keys of other layers' activations give
other selections, so the model is another one, with the shapes of the bundled one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from glm_fused.checkpoint.paths import bundled_folder

SCHEDULE = ("indexer_types", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset")
QUANTIZATIONS = ("quantization", "quantization_config")


def write_full_layers(folder: Path) -> None:
    """Write the bundled model, with an indexer on every layer, to a new ``folder``."""
    shutil.copytree(bundled_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = cast(dict[str, mx.array], mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    of_full_layer = ""
    for i, kind in enumerate(config["indexer_types"]):
        prefix = f"model.layers.{i}.self_attn.indexer."
        if kind == "full":
            of_full_layer = prefix
            continue
        for entries in (tensors, *(config[key] for key in QUANTIZATIONS)):
            _copy(entries, of_full_layer, prefix)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    full = {key: value for key, value in config.items() if key not in SCHEDULE}
    (folder / "config.json").write_text(json.dumps(full))


def _copy(entries: dict[str, Any], source: str, target: str) -> None:
    """Add what stands under the names that begin with ``source`` under ``target``, too."""
    entries |= {
        target + name.removeprefix(source): value
        for name, value in entries.items()
        if name.startswith(source)
    }
