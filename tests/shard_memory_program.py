"""A rank that loads a model: bytes of its share, of what it read, and of memory, as JSON.

``python shard_memory_program.py tensor|pipeline MODEL [SLOTS]``; with SLOTS, all of which a prompt
fills, so many experts of each layer are in the share, and a cache and buffers as planned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from glm_fused.loader import open_model
from glm_fused.models.line import Line
from glm_fused.models.ranks import Ranks
from glm_fused.streaming.options import StreamOptions


def number_in(file, key):
    """A number in a file of /proc, whose lines are keys and numbers."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run_prompt(model):
    """Have slots be filled."""
    tokens = mx.array(np.random.default_rng(3).integers(0, model.args.vocab_size, (1, 64)))
    mx.eval(model(tokens, model.make_cache()))
    mx.clear_cache()


def main(shard, path, slots=None):
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    mx.eval(mx.distributed.all_sum(mx.ones(4), group=group))
    memory, read = number_in("status", "VmRSS") << 10, number_in("io", "rchar")
    ranks = Ranks(group) if shard == "tensor" else Line(group)
    stream = None if slots is None else StreamOptions(slots=int(slots), context=256)
    opened = open_model(path, "auto", stream, 32, ranks=ranks)
    opened.read()
    share = sum(array.nbytes for _, array in tree_flatten(opened.model.parameters()))
    plan = None
    if stream is not None:
        plan = opened.model.streaming.plan
        share = plan.total - plan.shares.process
        run_prompt(opened.model)
    peak = number_in("status", "VmHWM") << 10
    now = number_in("status", "VmRSS") << 10
    found = {"share": share, "memory": now - memory, "peak": peak - memory}
    if plan is not None:
        found |= {"planned": plan.total, "highest": peak}
    print(json.dumps(found | {"read": number_in("io", "rchar") - read}))


if __name__ == "__main__":
    main(*sys.argv[1:])
