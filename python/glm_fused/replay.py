"""Traces of requests for experts, and what other banks and policies would have made of them.

A trace is JSON lines. The first says what the model is: ``{"experts": 256, "top_k": 8,
"expert_bytes": {"3": 21233664, …}, "slots": 64, "policy": "lru"}``; every other is one request:
``{"layer", "token", "experts", "hits", "misses", "bytes", "wait_us"}``, with one list of experts
per token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from . import _ext
from .streaming import Streaming
from .validation import show


class TraceWriter:
    """Writes what the banks of a model are asked for."""

    def __init__(self, streaming: Streaming, file: IO[str], top_k: int):
        self._streaming, self._file = streaming, file
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
                experts, top_k = request.pop("experts"), request.pop("top_k")
                assert isinstance(experts, list) and isinstance(top_k, int)
                rows = [experts[i : i + top_k] for i in range(0, len(experts), top_k)]
                line = {"layer": layer, **request, "experts": rows}
                self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@dataclass
class Trace:
    """``requests`` lists, per layer, the experts of each request, in order."""

    experts: int
    expert_bytes: dict[int, int]
    requests: dict[int, list[list[int]]] = field(default_factory=dict)
    tokens: int = 0

    def pins(self, layer: int, count: int) -> list[int]:
        """The experts of a layer that were asked for most often."""
        uses = Counter(expert for request in self.requests[layer] for expert in set(request))
        return [expert for expert, _ in uses.most_common(count)]


def read_trace(path: Path) -> Trace:
    """Read a trace; ValueError names the line that is not one of a trace."""
    with path.open() as file:
        trace: Trace | None = None
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                if trace is None:
                    sizes = {int(i): int(n) for i, n in entry["expert_bytes"].items()}
                    trace = Trace(int(entry["experts"]), sizes)
                else:
                    _add(trace, entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {show(line)}: {error!r}.") from None
    if trace is None or not trace.requests:
        raise ValueError(f"{path} has no requests.")
    return trace


def _add(trace: Trace, entry: dict[str, Any]) -> None:
    layer, rows = entry["layer"], entry["experts"]
    request = [expert for row in rows for expert in row]
    if layer not in trace.expert_bytes or not all(type(e) is int for e in request):
        raise ValueError("not a request of this trace")
    trace.requests.setdefault(layer, []).append(request)
    trace.tokens = max(trace.tokens, entry["token"] + len(rows))


def replay(
    trace: Trace,
    banks: Sequence[int],
    policies: Sequence[str],
    read_rate: float | None = None,
    compute_seconds: float = 0.0,
) -> dict[str, Any]:
    """Hit rates and bytes per token for every bank and policy, and for Belady's optimum.

    Requests of more experts than a bank has are taken in halves of the bank, as waves are.
    ``read_rate``, bytes a second, predicts tokens a second with ``compute_seconds`` a token. The
    ``pinned`` policy pins the most used experts to half of the bank.
    """
    rows = []
    for slots in banks:
        if not 1 <= slots <= trace.experts:
            raise ValueError(f"a bank of {slots} slots, expected 1 to {trace.experts}.")
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
    lines.append(f"{'slots':>6}  {'policy':<8}{'hit rate':>10}{'MB a token':>12}{'tok/s':>8}")
    for row in result["rows"]:
        speed = row.get("tokens_per_second")
        lines.append(
            f"{row['slots']:>6}  {row['policy']:<8}{row['hit_rate']:>10.3f}"
            f"{row['bytes_per_token'] / 1e6:>12.1f}{'-' if speed is None else f'{speed:.2f}':>8}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw hit rate, and speed where it is predicted, against the bank's size.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = ["hit_rate"]
    if all(row.get("tokens_per_second") for row in result["rows"]):
        keys.append("tokens_per_second")
    figure, axes = pyplot.subplots(1, len(keys), figsize=(6 * len(keys), 4), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["policy"] == policy]
            axis.plot([r["slots"] for r in rows], [r[key] for r in rows], "o-", label=policy)
        axis.set_xlabel("slots per layer")
        axis.set_ylabel(key.replace("_", " "))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
