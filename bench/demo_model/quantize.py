"""Quantize a trained demo model into the bundled MLX-layout checkpoint.

    python bench/demo_model/quantize.py demo_hf python/glm_fused/demo_model

Routed experts take 4 bits, everything else that mlx-lm quantizes 6 bits, both in groups of 64.
That is small enough for the wheel, and a mix of formats as the published GLM-5 checkpoints have.
It uses mlx-lm's own ``convert``, with this package's model registered.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import mlx.nn as nn
from mlx_lm.convert import convert

from glm_fused.mlx_lm.registration import register

GROUP_SIZE = 64
KEPT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "chat_template.jinja")  # fmt: skip


def bits_for(path: str, module: nn.Module) -> dict[str, int] | bool:
    """The format of one module: mlx-lm's ``quant_predicate``."""
    if not hasattr(module, "to_quantized") or "weights_proj" in path:
        return False
    return {"group_size": GROUP_SIZE, "bits": 4 if "switch_mlp" in path else 6}


def main() -> None:
    """Convert, then leave only the files that the package ships."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="HF checkpoint made by train.py")
    parser.add_argument("target", type=Path, help="new folder")
    arguments = parser.parse_args()
    register()
    convert(
        str(arguments.source),
        arguments.target,
        quantize=True,
        q_group_size=GROUP_SIZE,
        q_bits=4,
        quant_predicate=bits_for,
    )
    template = arguments.source / "chat_template.jinja"
    shutil.copy(template, arguments.target / template.name)
    for file in arguments.target.iterdir():
        if file.name not in KEPT:
            file.unlink()
        else:
            file.chmod(0o644)
    total = sum(file.stat().st_size for file in arguments.target.iterdir())
    print(f"{arguments.target}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
