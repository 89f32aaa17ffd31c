"""How many texts' caches have room in memory."""

from __future__ import annotations

from collections.abc import Sequence

from ...memory import machine_bytes
from ...models.decoder import Model
from ...models.prompt_memory import cache_bytes
from ...streaming.model import streaming_of
from ..planning import SHARE, cache_format, plan_prompt


class Capacity:
    """The columns of caches that there is room for, of all texts together.

    Where experts are streamed those are the context's that memory was planned for; else what the
    machine's memory has left beside the weights, a chunk of a prompt and ``reserved`` bytes, and at
    least the context.
    """

    def __init__(self, model: Model, reserved: int):
        self.columns = model.context
        if streaming_of(model) is None:
            plan = plan_prompt(model, model.context)
            column = cache_bytes(model.args, 1 << 20, cache_format(model)) / (1 << 20)
            left = machine_bytes() * SHARE - plan.weights - plan.temporaries - reserved
            self.columns = max(self.columns, int(left / column))

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether texts that grow to such lengths, padded to the longest, fit; one alone does."""
        return len(lengths) == 1 or len(lengths) * max(lengths) <= self.columns
