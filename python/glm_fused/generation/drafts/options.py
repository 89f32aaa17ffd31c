"""Which drafts to make, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.decoder import Model
from ...streaming.model import streaming_of
from ...validation import show
from ..limits import AUTO, LOOKUP, MOST_DRAFTS
from .depth import Depth, costs_of
from .drafter import Drafter
from .lookup import LookupDrafter


@dataclass(frozen=True)
class DraftOptions:
    """Which drafts to make.

    Attributes:
        depth: how many tokens in a step, 1 to 8, or "auto": as many as pay.
        source: what makes them: "lookup", what followed the last tokens earlier in the text.

    Raises ValueError, naming the option, for a value that it cannot have.
    """

    depth: int | str = AUTO
    source: str = LOOKUP

    def __post_init__(self) -> None:
        depth, most = self.depth, MOST_DRAFTS
        if depth != AUTO and (type(depth) is not int or not 1 <= depth <= most):
            expected = f"an integer from 1 to {most} or {AUTO!r}"
            raise ValueError(f"[drafts] depth is {show(depth)}, expected {expected}.")
        if self.source != LOOKUP:
            raise ValueError(f"[drafts] source is {show(self.source)}, expected {LOOKUP!r}.")

    def drafter(self, model: Model) -> Drafter:
        """What makes the drafts for one text of ``model``."""
        return LookupDrafter()

    def chooser(self, model: Model) -> Depth:
        """What decides how many a step has.

        Where experts are streamed, no more with "auto" than every layer's slots have room for the
        experts of, all tokens' choices together.
        """
        streaming, costs = streaming_of(model), costs_of(model)
        if self.depth != AUTO or streaming is None:
            return Depth(self.depth, costs=costs)
        tokens = streaming.tokens_at_once(model.args.num_experts_per_tok)
        return Depth(AUTO, MOST_DRAFTS if tokens is None else tokens - 1, costs)
