"""Decodes for bench_shards.py, as one process or as one of several that share the model.

A burst of several processes is decoded twice: with gathers, and with what each process computed
standing for what the others did, which takes as long but for the gathers.
"""

from __future__ import annotations

import argparse
import time

import mlx.core as mx
from bursts import serve
from decode_worker import Decoding, Subject

from glm_fused.loader import open_model
from glm_fused.models.ranks import Ranks


def timed(decoding: Decoding, threads: int, tokens: int) -> float:
    """The seconds of a burst."""
    start = time.perf_counter()
    decoding.burst(threads, tokens)
    return time.perf_counter() - start


def shared_burst(ranks: Ranks, decoding: Decoding, threads: int, tokens: int) -> dict[str, float]:
    """A burst with its gathers, and the seconds of one without."""
    ranks.meet()
    before = ranks.traffic
    seconds = timed(decoding, threads, tokens)
    gathers, nbytes = ranks.traffic - before
    ranks.meet()
    with ranks.alone():
        alone = timed(decoding, threads, tokens)
    return {
        "seconds": seconds,
        "alone_seconds": alone,
        "gathers": gathers / tokens,
        "gathered_bytes": nbytes / tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--shard", action="store_true")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    ranks = Ranks(mx.distributed.init(strict=True, backend="ring")) if options.shard else None
    opened = open_model(options.model, "auto", None, ranks=ranks)
    opened.read()
    decoding = Decoding(Subject(opened.model, opened.model), options.prompt)
    loaded = {"weight_bytes": opened.model.weight_bytes}
    if ranks is None:
        serve(loaded, decoding.burst)
        return
    serve(loaded, lambda threads, tokens: shared_burst(ranks, decoding, threads, tokens))


if __name__ == "__main__":
    main()
