"""Which drafts to make, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from ...models.decoder import Model
from ...streaming.model import streaming_of
from ...validation import show
from ..limits import AUTO, LOOKUP, MIXED, MOST_DRAFTS, MTP
from .depth import Depth
from .drafter import Drafter
from .experience import Experience, experience_of
from .lookup import LookupDrafter
from .mixed import MixedDrafter
from .mtp import MtpDrafter
from .rows import EachRow, MtpRows, RowDrafts
from .small_model import ModelDrafter


@dataclass(frozen=True)
class DraftOptions:
    """Which drafts to make.

    Attributes:
        depth: how many tokens in a step, 1 to 8, or "auto": as many as pay.
        source: what makes them: "mtp", the model's own layer for it; "lookup", what followed the
            last tokens earlier in the text; "mtp+lookup", whichever of the two pays; or the path of
            the small ``model``.
        model: a model of the same vocabulary, as mlx-lm loads it.

    Raises ValueError, naming the option, for a value that it cannot have.
    """

    depth: int | str = AUTO
    source: str = LOOKUP
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if (self.model is None) != (self.source in (MTP, LOOKUP, MIXED)):
            expected = f"{MTP!r}, {LOOKUP!r}, {MIXED!r} or the path of a model that is given"
            raise ValueError(f"[drafts] source is {show(self.source)}, expected {expected}.")

    def drafter(self, model: Model) -> Drafter:
        """What makes the drafts for one text of ``model``.

        Raises ValueError for a model without the layer, and a small one that cannot draft.
        """
        if self.model is not None:
            return ModelDrafter(self.model, model.args.vocab_size)
        if self.source == LOOKUP:
            return LookupDrafter()
        layer = MtpDrafter(model)
        return layer if self.source == MTP else MixedDrafter([LookupDrafter(), layer])

    def row_drafts(self, model: Model, padding: Sequence[int]) -> RowDrafts:
        """As `drafter`, for texts that are padded on the left with so many columns.

        Of both, the layer makes them: it drafts for all texts at once.
        """
        if self.source in (MTP, MIXED):
            return MtpRows(model, padding)
        return EachRow([self.drafter(model) for _ in padding])

    def chooser(self, model: Model, experience: Experience | None = None) -> Depth:
        """What decides how many a step has; without ``experience`` by that of all single texts.

        Where experts are streamed, no more with "auto" than every layer's slots have room for the
        experts of, all tokens' choices together.
        """
        streaming, experience = streaming_of(model), experience or experience_of(model)
        if self.depth != AUTO or streaming is None:
            return Depth(self.depth, experience=experience)
        tokens = streaming.tokens_at_once
        return Depth(AUTO, MOST_DRAFTS if tokens is None else tokens - 1, experience)

    def describe(self) -> dict[str, Any]:
        """The options, JSON-ready."""
        return {"depth": self.depth, "source": self.source}


def check_depth(depth: object) -> None:
    """Raise ValueError for a number of drafts that there cannot be."""
    if depth != AUTO and (type(depth) is not int or not 1 <= depth <= MOST_DRAFTS):
        expected = f"an integer from 1 to {MOST_DRAFTS} or {AUTO!r}"
        raise ValueError(f"[drafts] depth is {show(depth)}, expected {expected}.")
