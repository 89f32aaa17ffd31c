"""Writes traces of requests for experts, and tells what other banks and policies make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from .. import _ext
from ..drawing import new_figure, save
from .banks import Streaming
from .trace import Trace

OPTIMUM = "optimum (Belady)"


class TraceWriter:
    """Writes what the banks of a model are asked for."""

    def __init__(self, streaming: Streaming, file: IO[str], top_k: int):
        self._streaming, self._file, self._top_k = streaming, file, top_k
        self._choices = dict.fromkeys(streaming.banks, 0)
        layers = streaming.source.layers
        header = {
            "experts": streaming.plan.experts,
            "top_k": top_k,
            "expert_bytes": {str(i): layer.expert_bytes for i, layer in layers.items()},
            "slots": streaming.plan.slots,
        }
        file.write(json.dumps(header) + "\n")
        self.write()

    def write(self) -> None:
        """Append the requests since the last call."""
        for layer, bank in self._streaming.banks.items():
            for request in bank.take_requests():
                experts, width = request.pop("experts"), request.pop("top_k")
                assert isinstance(experts, list) and isinstance(width, int)
                rows = [experts[i : i + width] for i in range(0, len(experts), width)]
                request["token"] = self._choices[layer] // self._top_k
                self._choices[layer] += len(experts)
                line = {"layer": layer, **request, "experts": rows}
                self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def replay(
    trace: Trace,
    banks: Sequence[int],
    policies: Sequence[str],
    read_rate: float | None = None,
    compute_seconds: float = 0.0,
) -> dict[str, Any]:
    """Hit rates and bytes per token for every bank and policy, and for Belady's optimum.

    ``banks`` are numbers of slots per layer. Requests for more experts than a bank has are taken in
    halves of the bank, as waves are. From ``read_rate``, in bytes a second, and ``compute_seconds``
    per token follow predicted tokens a second. The ``pinned`` policy pins the most used experts to
    half of the bank.
    """
    rows = []
    for slots in banks:
        if not trace.top_k <= slots <= trace.experts:
            raise ValueError(
                f"a bank of {slots} slots, expected {trace.top_k} to {trace.experts}: a token"
                f" needs {trace.top_k}."
            )
        waves = {i: _waves(requests, slots) for i, requests in trace.requests.items()}
        for policy in (*policies, "optimum"):
            row = _run(trace, waves, slots, policy)
            if read_rate:
                seconds = compute_seconds + row["bytes_per_token"] / read_rate
                row["tokens_per_second"] = 1 / seconds if seconds else None
            rows.append(row)
    return {"tokens": trace.tokens, "layers": len(trace.requests), "rows": rows}


def _waves(requests: Sequence[Sequence[int]], slots: int) -> list[list[int]]:
    result = []
    for request in requests:
        experts = list(dict.fromkeys(request))
        step = len(experts) if len(experts) <= slots else max(1, slots // 2)
        result += [experts[i : i + step] for i in range(0, len(experts), step)]
    return result


def _run(
    trace: Trace, waves: dict[int, list[list[int]]], slots: int, policy: str
) -> dict[str, Any]:
    hits = misses = nbytes = 0
    for layer, requests in waves.items():
        if policy == "optimum":
            h, m = _ext.slots_simulate_optimum(trace.experts, slots, requests)
        else:
            largest = max(map(len, requests))
            count = min(slots // 2, slots - largest) if policy == "pinned" else 0
            pins = trace.pins(layer, count)
            h, m = _ext.slots_simulate(policy, trace.experts, slots, pins, requests)
        hits, misses = hits + h, misses + m
        nbytes += m * trace.expert_bytes[layer]
    return {
        "slots": slots,
        "policy": policy,
        "hit_rate": hits / (hits + misses),
        "bytes_per_token": nbytes / max(trace.tokens, 1),
    }


def format_replay(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{result['tokens']} tokens, {result['layers']} layers"]
    rows = [("slots", "policy", "hit rate", "MB a token", "tok/s")]
    for row in result["rows"]:
        speed = row.get("tokens_per_second")
        rows.append(
            (
                f"{row['slots']}",
                row["policy"],
                f"{row['hit_rate']:.3f}",
                f"{row['bytes_per_token'] / 1e6:,.3f}",
                "-" if speed is None else f"{speed:,.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for slots, policy, *numbers in rows:
        cells = [f"{slots:>{widths[0]}}", f"{policy:<{widths[1]}}"]
        cells += [f"{text:>{width}}" for text, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw hit rate, and speed where it is predicted, against the bank's size.

    Raises ImportError without matplotlib, and ValueError for a file that cannot be written.
    """
    panels = [("hit_rate", "hit rate (%)", 100)]
    if all(row.get("tokens_per_second") for row in result["rows"]):
        panels.append(("tokens_per_second", "predicted speed (tokens/s)", 1))
    figure = new_figure(6 * len(panels), 4)
    for i, (key, label, scale) in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), i)
        for policy in dict.fromkeys(row["policy"] for row in result["rows"]):
            rows = sorted((r["slots"], scale * r[key]) for r in result["rows"]
                          if r["policy"] == policy)  # fmt: skip
            best = policy == "optimum"
            name, style, color = (OPTIMUM, "--", "black") if best else (policy, "o-", None)
            axis.plot(*zip(*rows, strict=True), style, color=color, markersize=4, label=name)
        axis.set_xlabel("slots per layer (experts)")
        axis.set_ylabel(label)
        axis.locator_params("x", integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save(figure, path)
