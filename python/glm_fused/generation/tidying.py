"""Has MLX let go of memory that it keeps for later."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..models.decoder import Model
from ..models.pipeline import StagedModel


def tidy(model: Model) -> None:
    """Let go of memory that is not in use, once what ``model`` has begun is done.

    On a CPU MLX would wait for that by itself, but no other thread of Python could run meanwhile.
    Where ranks share the model it may take long, or for ever, and threads have to say so.
    """
    mx.synchronize(generation_stream)
    if isinstance(model, StagedModel):
        model.line.wait()
    mx.clear_cache()
