"""The options of streaming routed experts: what can be asked for, and what is usual.

The command line's help shows the defaults, so nothing here imports MLX.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DEFAULT_CONTEXT = 4096  # memory is planned for so many tokens, unless another number is asked for
POLICIES = ("learned", "lru", "s3fifo", "pinned")
RANGES = {  # what callers and the command line may ask for, by the names that they use
    "slots": (1, 2**20),
    "context": (1, 2**31 - 1),
    "lookahead": (0, 2**20),
    "read_depth": (1, 256),
    "prefill_step_size": (1, 2**20),
}


@dataclass(frozen=True)
class StreamOptions:
    """How to stream routed experts.

    Attributes:
        budget: bytes that the process may keep resident, or None for what this machine affords.
        slots: experts resident per layer, in place of as many as the budget allows.
        context: tokens to keep room for in the KV cache; None: ``default_context``.
        default_context: what is planned for without ``context``, or the model's whole context where
            that is less.
        sidecar: folder of a packed sidecar; None reads the checkpoint's own shards.
        policy: which expert gives way: "learned" (the one least likely to be asked for next, as
            learned from the requests so far), "lru", "s3fifo" or "pinned" ("lru" but for ``pins``).
        pins: per layer, experts that stay once they are read.
        spares: slots per layer for experts that the next layer's router is likely to choose.
        direct: whether to read past the page cache.
        depth: reads in flight.
        split: bytes per read, a multiple of 4096.
        patience: seconds to wait for slots held by work in flight.
        prompts: bytes that a store of prompts' caches may take.
    """

    budget: int | None = None
    slots: int | None = None
    context: int | None = None
    default_context: int = DEFAULT_CONTEXT
    sidecar: str | os.PathLike[str] | None = None
    policy: str = "learned"
    pins: Mapping[int, Sequence[int]] = field(default_factory=dict)
    spares: int = 0
    direct: bool = False
    depth: int = 16
    split: int = 1 << 20
    patience: float = 60.0
    prompts: int = 0
