"""How bench_decode.py talks to the processes that decode for it; it needs no other package.

A process first prints a line of JSON about what it loaded. A request is a line on its stdin,
``{"threads": 2, "tokens": 128}``, and its answer one on its stdout: the ``seconds`` of that burst,
and of these, where they can be told, ``graph_seconds`` in which Python built graphs and
``kernel_seconds`` in which a recorded step ran.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(loaded: dict[str, Any], burst: Callable[[int, int], dict[str, float]]) -> None:
    """Answer requests until stdin ends.

    ``burst`` decodes with so many threads so many tokens, and returns what can be told of the
    seconds that it took.
    """
    print(json.dumps(loaded), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        parts = burst(request["threads"], request["tokens"])
        answer = {"seconds": time.perf_counter() - start} | parts
        print(json.dumps(answer), flush=True)
