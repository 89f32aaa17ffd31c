"""Plans the memory of a prompt: how much of it a model takes at a time, and the peak."""

from __future__ import annotations

from ..formats.kv_rows import FLOATS
from ..memory import machine_bytes
from ..models.decoder import Model
from ..models.pipeline import StagedModel
from ..models.prompt_memory import PromptPlan, cache_bytes, chunk_bytes, fitting_step
from ..streaming.model import streaming_of

SHARE = 0.85  # of the machine's memory, for a model that no budget was given for


def plan_prompt(model: Model, context: int, weight_bytes: int | None = None) -> PromptPlan:
    """Plan a prompt and what follows it, ``context`` tokens together.

    The prefill step is the one that the model was loaded with or its budget was planned for; else
    the largest that fits in the machine's memory. ``weight_bytes`` are the model's, for callers
    that have counted them.
    """
    args, streamed = model.args, streaming_of(model) is not None
    float_bytes = _float_bytes(model)
    ranks = 1 if model.ranks is None else model.ranks.size
    weights = model.weight_bytes if weight_bytes is None else weight_bytes
    cache = cache_bytes(args, context, cache_format(model))

    def plan(step: int) -> PromptPlan:
        temporaries = chunk_bytes(args, step, context, float_bytes, streamed, ranks)
        return PromptPlan(step, context, weights, cache, temporaries)

    budget = int(machine_bytes() * SHARE)
    return plan(model.prefill_step_size or fitting_step(lambda step: plan(step).total, budget))


def cache_format(model: Model) -> str:
    """The format that new caches have: one of `glm_fused.formats.kv_rows`, not "auto"."""
    if model.kv_format != "auto":
        return model.kv_format
    float_bytes = _float_bytes(model)
    return next(name for name, dtype in FLOATS.items() if dtype.size == float_bytes)


def _float_bytes(model: Model) -> int:
    """The bytes of a value of the activations, which have the widest type that they meet."""
    if isinstance(model, StagedModel):
        return model.rows_dtype.size
    embedding = model.model.embed_tokens
    table = embedding.scales if "scales" in embedding else embedding.weight
    norm = model.layers[0].input_layernorm.weight
    return max(2, table.dtype.size, norm.dtype.size)
