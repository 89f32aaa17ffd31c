"""Prompt caches in files, which mlx-lm writes and anyone may have changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx_lm.models import cache as stock
from mlx_lm.models.cache import CacheList

from ..models.cache_check import check_cache
from ..models.config import ModelArgs
from .safetensors_header import read_header


def load_prompt_cache(path: str | os.PathLike[str], args: ModelArgs) -> list[CacheList]:
    """A prompt cache that mlx-lm's ``save_prompt_cache`` wrote, read and checked.

    Raises FileNotFoundError for a missing file and ValueError, naming the file or layer, for one
    that is damaged, no prompt cache, or not this model's.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"[cache] {path}: expected a file whose name ends in .safetensors.")
    read_header(path)
    try:
        cache = stock.load_prompt_cache(str(path))
        mx.eval([layer.state for layer in cache])
    except Exception as error:  # it takes the file's word for everything
        raise ValueError(
            f"[cache] {path} is no prompt cache that mlx-lm wrote:"
            f" reading it ends with {type(error).__name__}."
        ) from error
    check_cache(cache, args, None, args.layers)
    return cast(list[CacheList], cache)
