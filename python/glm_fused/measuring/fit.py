"""Whether and how a model runs on this machine, and how fast, from its headers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..checkpoint.checked import checked
from ..checkpoint.description import count, describe_checkpoint
from ..checkpoint.folder import Checkpoint
from ..formats.kv_rows import FLOATS
from ..generation.planning import SHARE
from ..memory import machine_bytes, size
from ..models.prompt_memory import chunk_bytes, fitting_step
from ..selftest.benchmark import Yardsticks, read_bandwidth
from ..streaming.banks import find_source, plan_streaming
from ..streaming.budget import Plan
from ..streaming.options import StreamOptions

RESIDENT, STREAMED, NOT = "resident", "streamed", "no"
YARDSTICK_BYTES = 256 << 20


def fit(
    checkpoint: Checkpoint,
    memory_rate: Callable[[], float],
    disk_rate: Callable[[], float],
) -> dict[str, Any]:
    """How the model runs here, JSON-ready.

    Args:
        checkpoint: the model; nothing but its headers is read.
        memory_rate: measures the bytes a second at which memory is read.
        disk_rate: measures the same of the disk; it is called where experts have to be streamed.

    Returns:
        ``runs``: "resident", with all of it in memory, "streamed", or "no" and ``why``;
        ``memory``: bytes of the machine, of it for models, and of a resident one with a prompt's
        cache and temporaries; ``read``: the rates, in GB/s; ``slots`` and ``experts`` of a streamed
        layer; and ``tokens_per_second``: of a resident model ``at_most``, as fast as memory is
        read, and of a streamed one the same with experts ``at_random``, as if each were as likely,
        and with ``no_hits``, as if none were in memory.
    """
    try:
        args, inventory = checked(checkpoint)
        about = describe_checkpoint(checkpoint)
    except ValueError as error:
        return {"runs": NOT, "why": str(error)}
    prompt, total = about["prompt_memory"], machine_bytes()
    float_bytes = FLOATS[inventory.float_format].size

    def needed(step: int) -> int:
        chunk = chunk_bytes(args, step, prompt["context"], float_bytes, streamed=False)
        return int(prompt["weights"] + prompt["cache"] + chunk)

    affordable = int(SHARE * total)
    resident = needed(fitting_step(needed, affordable))
    memory = {"machine": total, "affordable": affordable, "resident": resident}
    names = ("variant", "parameters", "active_parameters", "bytes_loaded", "bytes_read_per_token")
    found = {name: about[name] for name in names} | {"memory": memory}
    if resident <= affordable:
        rate = memory_rate()
        speed = {"at_most": rate / about["bytes_read_per_token"]}
        return found | {"runs": RESIDENT, "read": _read(rate), "tokens_per_second": speed}
    try:
        source = find_source(checkpoint, args, None)
        plan = plan_streaming(inventory, args, source, StreamOptions(), "auto")
    except ValueError as error:
        return found | {"runs": NOT, "why": str(error)}
    rates = memory_rate(), disk_rate()
    return found | {
        "runs": STREAMED,
        "slots": plan.slots,
        "experts": plan.experts,
        "read": _read(*rates),
        "tokens_per_second": _streamed_speed(about, plan, *rates),
    }


def _read(memory: float, disk: float | None = None) -> dict[str, float | None]:
    rates = {"memory": memory, "disk": disk}
    return {name: None if rate is None else rate / 1e9 for name, rate in rates.items()}


def _streamed_speed(
    about: dict[str, Any], plan: Plan, memory: float, disk: float
) -> dict[str, float]:
    """Tokens a second where all weights are read from memory, and experts from the disk before."""
    computed = about["bytes_read_per_token"] / memory
    all_missed = random_missed = 0.0
    for layer in about["each_layer"]:
        nbytes, experts = layer["expert_bytes_per_token"], layer["experts"]
        if experts:
            all_missed += nbytes
            random_missed += nbytes * (1 - min(plan.slots, experts) / experts)
    return {
        "at_random": 1 / (computed + random_missed / disk),
        "no_hits": 1 / (computed + all_missed / disk),
    }


def memory_rate() -> float:
    """The bytes a second of plain reads of memory on MLX's device, the best of five."""
    yardsticks = Yardsticks(YARDSTICK_BYTES)
    array = yardsticks.huge if yardsticks.moved else yardsticks.given
    rate = max(read_bandwidth(array) for _ in range(5)) * 1e9
    mx.clear_cache()
    return rate


def format_fit(found: dict[str, Any]) -> list[str]:
    """What `fit` gave, as lines for a terminal."""
    lines = []
    if "variant" in found:
        parameters = f"{count(found['parameters'])} parameters"
        active = f"{count(found['active_parameters'])} active a token"
        memory = found["memory"]
        lines += [
            f"  model       {found['variant']}, {parameters}, {active}",
            f"  memory      {size(memory['resident'])} with all weights and a prompt, of"
            f" {size(memory['affordable'])} for models here ({size(memory['machine'])} in all)",
        ]
    if "read" in found:
        disk = found["read"]["disk"]
        rest = "" if disk is None else f", the disk at {disk:.2f} GB/s"
        lines.append(f"  measured    memory is read at {found['read']['memory']:.1f} GB/s{rest}")
    return [*lines, f"  runs        {_verdict(found)}"]


def _verdict(found: dict[str, Any]) -> str:
    if found["runs"] == NOT:
        return f"not at all: {found['why']}"
    speed = found["tokens_per_second"]
    if found["runs"] == RESIDENT:
        return (
            f"with all of it in memory, at most {speed['at_most']:.1f} tokens/s: as fast as memory"
            " is read"
        )
    return (
        f"with --memory-budget auto, {found['slots']} of {found['experts']} experts a layer in"
        f" memory: some {speed['at_random']:.2f} tokens/s if each expert were as likely (what"
        f" models ask for is less even), {speed['no_hits']:.2f} if none were there"
    )
