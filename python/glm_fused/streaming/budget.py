"""Shares a memory budget out between weights, cache, slots and buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from ..memory import machine_bytes, size
from ..models.config import ModelArgs
from ..models.prompt_memory import STEPS, fitting_step
from .options import StreamOptions

# The process grows after planning by tokenizer, code and heaps of threads; 30 MB are usual.
PROCESS_GROWTH = 48 << 20
SHORTEST_CONTEXT = 256  # a refusal proposes no shorter one


@dataclass(frozen=True)
class Shares:
    """Bytes that do not depend on the number of slots.

    ``process`` is what is resident before loading, and its usual growth; ``dense`` is all weights
    but routed experts; ``kv`` is the cache; ``staging`` is read buffers and the temporaries of a
    prompt; ``prompts`` is the caches that are kept of earlier prompts.
    """

    process: int
    dense: int
    kv: int
    staging: int
    prompts: int = 0

    @property
    def total(self) -> int:
        """The sum of all shares, in bytes."""
        return self.process + self.dense + self.kv + self.staging + self.prompts


class LayerSlots(NamedTuple):
    """What a layer's slots are for: so many experts, each of so many bytes."""

    experts: int
    expert_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a budget is used.

    Each of ``layers`` has ``slots`` slots, or fewer where it has fewer experts. ``budget`` is in
    bytes, ``context`` in tokens, and so is ``prefill_step_size``, the chunks of a prompt.
    """

    budget: int
    shares: Shares
    context: int
    layers: tuple[LayerSlots, ...]
    slots: int
    prefill_step_size: int

    @property
    def experts(self) -> int:
        """The most experts that a layer has; a rank may have no layers with any."""
        return max((layer.experts for layer in self.layers), default=0)

    @property
    def slot_bytes(self) -> int:
        """The bytes of all slots of all layers."""
        return sum(min(self.slots, experts) * nbytes for experts, nbytes in self.layers)

    @property
    def total(self) -> int:
        """The bytes that the plan takes."""
        return self.shares.total + self.slot_bytes

    def format(self) -> str:
        """A table for a terminal."""
        s = self.shares
        rows = [
            ("program", s.process, "code, tokenizer, and what is resident already"),
            ("dense weights", s.dense, "all but routed experts"),
            ("KV cache", s.kv, f"{self.context:,} tokens"),
            *([("prompt cache", s.prompts, "of earlier prompts")] if s.prompts else []),
            (
                "buffers",
                s.staging,
                f"of reads, and temporaries of {self.prefill_step_size:,} tokens of a prompt",
            ),
            (
                "slots",
                self.slot_bytes,
                f"{self.slots} of {self.experts} x {len(self.layers)} layers, for experts",
            ),
            ("total", self.total, f"of a budget of {size(self.budget)}"),
        ]
        return "\n".join(f"{name:<14}{size(n):>11}  {note}".rstrip() for name, n, note in rows)


def make_plan(
    args: ModelArgs,
    shares_for: Callable[[int, int], Shares],
    layers: Sequence[LayerSlots],
    options: StreamOptions,
    prefill_step_size: int | None = None,
) -> Plan:
    """Plan the prefill step and as many slots per layer as the budget holds, or ``options.slots``.

    ``args`` are those of the whole model, of which ``layers`` may be a rank's alone. ``shares_for``
    gives the shares of a context and a prefill step, both in tokens. Without a
    ``prefill_step_size`` the step is the largest that leaves room for the slots that a token needs,
    or those asked for. Raises ValueError for a context beyond the model's and for an impossible
    number of slots, and, with the numbers and what would fit, where these slots do not fit.
    """
    context = planned_context(args, options.context, options.default_context)
    least = args.num_experts_per_tok + options.spares
    budget = affordable_bytes(options.direct) if options.budget is None else options.budget
    wanted = least if options.slots is None else options.slots

    def plan_with(step: int) -> Plan:
        return Plan(budget, shares_for(context, step), context, tuple(layers), wanted, step)

    step = prefill_step_size or fitting_step(lambda n: plan_with(n).total, budget)
    plan = plan_with(step)
    most = max(layer.experts for layer in args.model_layers)
    if not least <= wanted <= most:
        raise ValueError(
            f"[budget] {wanted} slots a layer, expected {least} to {most}: a token needs"
            f" {args.num_experts_per_tok} and {options.spares} are spare."
        )
    if plan.total > budget and (options.budget is not None or options.slots is None):
        raise ValueError(_refusal(plan, budget, least, shares_for))
    slots = min(wanted, plan.experts)
    if options.slots is None:
        slots = _largest(plan.experts, lambda n: replace(plan, slots=n).total <= budget)
    return replace(plan, slots=slots, budget=max(budget, plan.total))


def planned_context(args: ModelArgs, context: int | None, default: int) -> int:
    """The tokens to plan for: ``context``, or ``default`` within the model's own context.

    Raises ValueError for a ``context`` beyond the model's own.
    """
    limit = args.max_position_embeddings
    if context is None:
        return min(default, limit)
    if not 1 <= context <= limit:
        raise ValueError(
            f"[budget] a context of {context:,} tokens, expected 1 to {limit:,}, the model's own"
            " (max_position_embeddings)."
        )
    return context


def _refusal(plan: Plan, budget: int, least: int, shares_for: Callable[[int, int], Shares]) -> str:
    """Why a plan does not fit, and what would."""
    shares, step = plan.shares, plan.prefill_step_size
    prompts = f"{size(shares.prompts)} for earlier prompts, " if shares.prompts else ""
    reason = (
        f"[budget] {size(budget)} cannot hold {size(plan.total)}: {size(shares.process)} for the"
        f" program, {size(shares.dense)} for all weights but routed experts, {size(shares.kv)} for"
        f" a KV cache of {plan.context:,} tokens, {prompts}{size(shares.staging)} for buffers and"
        f" {step:,} tokens of a prompt at a time, and {size(plan.slot_bytes)} for {plan.slots}"
        f" experts a layer (a token needs {least})"
    )
    rest = budget - plan.slot_bytes
    ways = [f"a budget of {_upwards(plan.total)}"]
    ways += ["no prompt cache"] if 0 < plan.total - budget <= shares.prompts else []
    context = _largest(plan.context, lambda n: shares_for(n, step).total <= rest)
    if context >= SHORTEST_CONTEXT:
        ways.append(f"a context of at most {context:,} tokens")
    steps = (n for n in STEPS if n < step and shares_for(plan.context, n).total <= rest)
    ways += [f"a prefill step of {n:,} tokens" for n in islice(steps, 1)]
    slots_left = _largest(plan.slots, lambda n: replace(plan, slots=n).total <= budget)
    if least <= slots_left < plan.slots:
        ways.append(f"{slots_left} slots a layer")
    return f"{reason}; {' or '.join(ways)} would fit."


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to ``limit`` that fits, 0 if none does; all below one that fits do too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _upwards(n: int) -> str:
    """A size, as a user would type it, of n bytes and 2 % for what differs from run to run."""
    number, unit = size(n + n // 50).split()
    return f"{number}{unit}"


def affordable_bytes(direct: bool) -> int:
    """The bytes to budget on this machine, where nobody says.

    Without ``direct`` they leave more to the page cache, which reads go through: a larger bank
    would be slower.
    """
    return int(machine_bytes() * (0.85 if direct else 0.6))
