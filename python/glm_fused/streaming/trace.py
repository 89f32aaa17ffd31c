"""Traces of requests for experts, read from a file that anyone may have written.

A trace is JSON lines. The first says what the model is: ``{"experts": 256, "top_k": 8,
"expert_bytes": {"3": 21233664, …}, "slots": 64}``; every other is one request: ``{"layer",
"token", "experts", "hits", "misses", "bytes", "wait_us"}``. ``experts`` has one list per token, or
where a prompt is taken in waves one list of one expert per choice; ``token`` is how many tokens
came before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_header import parse_json_object
from ..models.config import MAX_LAYERS
from ..validation import show

# This bounds the work of a replay: a policy looks at every expert at each request, and the learned
# one keeps 4 * experts^2 bytes. Models have up to 512.
MAX_EXPERTS = 4096
MAX_BYTES = 2**53  # an expert may have so many bytes, which floats hold exactly


@dataclass
class Trace:
    """A trace as read; ``requests`` lists, per layer, the experts of each request in order."""

    experts: int
    top_k: int
    expert_bytes: dict[int, int]
    requests: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens the model ran on, as the layer with the most choices tells."""
        # Layers may differ: a prompt's last chunk needs no experts of the last one.
        choices = (sum(map(len, requests)) for requests in self.requests.values())
        return max(choices, default=0) // self.top_k

    def pins(self, layer: int, count: int) -> list[int]:
        """The ``count`` experts of a layer that most requests named."""
        uses = Counter(expert for request in self.requests[layer] for expert in set(request))
        return [expert for expert, _ in uses.most_common(count)]


def read_trace(path: Path) -> Trace:
    """Read a trace; raises ValueError, naming file and line, for one that is not of a trace."""
    trace: Trace | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if trace is None:
                    trace = _header(_entry(line, where, "header"), where)
                else:
                    layer, request = _request(_entry(line, where, "request"), trace, where)
                    trace.requests.setdefault(layer, []).append(request)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a trace.") from None
    if trace is None or not trace.requests:
        raise ValueError(f"{path} has no requests, expected what generate --trace wrote.")
    return trace


def _entry(line: bytes, where: str, kind: str) -> dict[str, Any]:
    try:
        return parse_json_object(line, where)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}, expected the {kind} of a trace.") from None


def _header(entry: dict[str, Any], where: str) -> Trace:
    experts = _integer(entry, "experts", where, MAX_EXPERTS)
    top_k = _integer(entry, "top_k", where, experts)
    sizes = entry.get("expert_bytes")
    names = {str(layer): layer for layer in range(MAX_LAYERS)}
    if not isinstance(sizes, dict) or not sizes or not sizes.keys() <= names.keys():
        raise ValueError(
            f"{where}: expert_bytes {show(sizes)}, expected a size for every layer in the header of"
            " a trace."
        )
    layers = {names[name]: _integer(sizes, name, where, MAX_BYTES) for name in sizes}
    return Trace(experts, top_k, layers)


def _request(entry: dict[str, Any], trace: Trace, where: str) -> tuple[int, list[int]]:
    layer, rows = entry.get("layer"), entry.get("experts")
    if type(layer) is not int or not isinstance(rows, list) or not rows:
        raise ValueError(f"{where}: {show(entry)}, expected the request of a trace.")
    if layer not in trace.expert_bytes:
        raise ValueError(
            f"{where}: layer {show(layer)}, which the header does not name as one with experts."
        )
    width = len(rows[0]) if isinstance(rows[0], list) else 0
    if width not in (1, trace.top_k):
        raise ValueError(
            f"{where}: {show(rows[0])}, expected the request of a trace: {trace.top_k} experts a"
            " token."
        )
    request: list[int] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"{where}: {show(row)}, expected {width} experts, as before it.")
        request += row
    for expert in request:
        if type(expert) is not int or not 0 <= expert < trace.experts:
            raise ValueError(
                f"{where}: expert {show(expert)}, expected 0 to {trace.experts - 1}, as the header"
                " says."
            )
    return layer, request


def _integer(entry: dict[str, Any], key: str, where: str, high: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not 1 <= value <= high:
        raise ValueError(
            f"{where}: {key} {show(value)}, expected an integer from 1 to {high} in the header of"
            " a trace."
        )
    return value
