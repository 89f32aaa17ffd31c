"""Shares a memory budget out between weights, cache, slots and buffers."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from .cache import bytes_per_token
from .chunks import BUDGET_BYTES
from .config import ModelArgs
from .validation import show

if TYPE_CHECKING:
    from .streaming import StreamOptions

PREFILL_TOKENS = 2048  # mlx-lm's chunk of a prompt
PROCESS_GROWTH = 48 << 20  # after planning: tokenizer, code, heaps of threads; 30 MB are usual
MAX_SCRATCH = 64 << 20  # of indexer_topk and of sparse_mla_decode
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in texts such as "24GB", "512MiB" or "1000"; ValueError for others and from 2^63 on."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size such as 24GB or 512MiB: {show(text)}")
    number, unit, binary = match.groups()
    power = "kmgt".find(unit.lower()) + 1 if unit else 0
    factor = 1024**power if binary else _UNITS[unit.lower()]
    nbytes = float(number) * factor
    if nbytes >= 2**63:
        raise ValueError(f"expected a size below 2^63 bytes: {show(text)}")
    return int(nbytes)


@dataclass(frozen=True)
class Shares:
    """Bytes that do not depend on the number of slots."""

    process: int
    dense: int
    kv: int
    staging: int

    @property
    def total(self) -> int:
        return self.process + self.dense + self.kv + self.staging


@dataclass(frozen=True)
class Plan:
    """How a budget is used. ``expert_bytes`` is one slot in every layer."""

    budget: int
    shares: Shares
    context: int
    layers: int
    experts: int
    expert_bytes: int
    slots: int

    @property
    def slot_bytes(self) -> int:
        return self.slots * self.expert_bytes

    @property
    def total(self) -> int:
        return self.shares.total + self.slot_bytes

    def format(self) -> str:
        """A table for a terminal."""
        s = self.shares
        rows = [
            ("process", s.process, ""),
            ("dense weights", s.dense, ""),
            ("KV cache", s.kv, f"{self.context:,} tokens"),
            ("staging", s.staging, "read buffers and a prompt chunk's temporaries"),
            ("slots", self.slot_bytes, f"{self.slots} of {self.experts} x {self.layers} layers"),
            ("total", self.total, f"of a budget of {size(self.budget)}"),
        ]
        return "\n".join(f"{name:<14}{size(n):>11}  {note}".rstrip() for name, n, note in rows)


def make_plan(
    args: ModelArgs, shares: Shares, expert_bytes: Sequence[int], options: StreamOptions
) -> Plan:
    """As many slots a layer as the budget holds, or ``options.slots``.

    ``expert_bytes`` is the size of one expert in each layer. Raises ValueError, with the numbers,
    if fewer than a token needs fit, or if the asked number does not.
    """
    experts = args.n_routed_experts or 0
    per_slot, least = sum(expert_bytes), args.num_experts_per_tok + options.spares
    budget = affordable_bytes(options.direct) if options.budget is None else options.budget
    wanted = least if options.slots is None else options.slots
    if not least <= wanted <= experts:
        raise ValueError(
            f"[budget] {wanted} slots a layer, expected {least} to {experts}: a token needs"
            f" {args.num_experts_per_tok} and {options.spares} are spare."
        )
    needed = shares.total + wanted * per_slot
    if needed > budget and (options.budget is not None or options.slots is None):
        raise ValueError(
            f"[budget] {size(budget)} cannot hold {size(needed)}: process {size(shares.process)},"
            f" dense weights {size(shares.dense)}, KV cache {size(shares.kv)} for"
            f" {options.context:,} tokens, staging {size(shares.staging)} and {wanted} slots a"
            f" layer {size(wanted * per_slot)}."
        )
    if options.slots is None:
        wanted = min(experts, (budget - shares.total) // per_slot)
    return Plan(
        max(budget, needed), shares, options.context, len(expert_bytes), experts, per_slot, wanted
    )


def resident_bytes() -> int:
    """What this process keeps in memory now (on macOS: its peak so far)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def affordable_bytes(direct: bool) -> int:
    """A budget for this machine.

    Reads through the page cache need room there: a larger bank would be slower.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
        total = min(total, int(limit.read_text()))
    return int(total * (0.85 if direct else 0.6))


def cache_bytes(args: ModelArgs, context: int, kv_format: str) -> int:
    """Of a KV cache that grew to ``context`` tokens."""
    # It grows in steps of 256 tokens or an eighth, and is copied, a layer at a time.
    tokens = context + max(256, context // 8)
    cached = bytes_per_token(args, kv_format) * tokens
    return cached + cached // args.num_hidden_layers


def prompt_bytes(args: ModelArgs, context: int) -> int:
    """An estimate of the temporaries of one prompt chunk."""
    tokens = min(PREFILL_TOKENS, context)
    # Float32 at worst: rows gathered for experts, their outputs, the same joined and reordered.
    routed = 4 * tokens * args.num_experts_per_tok * args.hidden_size * 4
    latent = args.kv_lora_rank + args.qk_rope_head_dim
    widest = max(3 * args.intermediate_size, 4 * args.num_attention_heads * latent)
    dense = 4 * tokens * (widest + 8 * args.hidden_size)
    return routed + dense + _attention_bytes(args, tokens, context)


def _attention_bytes(args: ModelArgs, tokens: int, context: int) -> int:
    """Of scores and what is computed from them, within the limits that the ops keep."""
    sparse, listed = context > args.index_topk, min(context, args.index_topk)
    scores = 4 * tokens * context if sparse else 0
    attended = 4 * tokens * listed
    if mx.default_device() == mx.gpu:  # stock ops, where a Metal kernel does not apply
        row = args.num_attention_heads + sparse * (args.kv_lora_rank + args.qk_rope_head_dim)
        return 4 * min(BUDGET_BYTES, max(scores * args.index_n_heads, attended * row))
    heads = args.num_attention_heads
    return min(MAX_SCRATCH, scores) + min(MAX_SCRATCH, attended * heads) + sparse * attended


def size(n: int) -> str:
    """In the unit that people buy memory in."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n} B"
