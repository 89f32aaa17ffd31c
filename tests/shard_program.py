"""A rank of some models: what `steps_of` gives of each, saved in ``FOLDER/MODEL.RANK.npz``.

``python shard_program.py FOLDER SPLIT MODEL...``, where SPLIT is ``rows``, or ``columns``: then one
matrix of each model is split along the columns of its rows, as it must not be. The indexer's scores
are shared out wherever they can be; with ``recorded`` nowhere, so that decode steps are recorded,
and the last array is how many were; with ``unjoined`` they are recorded without their gathers, as
they must not be. With the environment's MTP "0" models are without their MTP layer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, CacheList

from glm_fused import load_model, ops
from glm_fused.loader import open_model
from glm_fused.models import sharded_indexer
from glm_fused.models.ranks import Ranks


def steps_of(model, decoded=3):
    """The logits of a prompt, steps, a step of three tokens, drafts and a batch, in order.

    The prompt is longer than what a query selects.
    """
    rng, prompt = np.random.default_rng(7), model.args.index_topk + 20
    tokens = mx.array(rng.integers(0, model.args.vocab_size, (1, prompt + decoded + 3)))
    cache, found = model.make_cache(), []
    logits, hidden = model.states(tokens[:, :prompt], cache)
    found.append(logits[:, -8:])
    for i in range(prompt, prompt + decoded):
        logits, hidden = model.states(tokens[:, i : i + 1], cache)
        found.append(logits)
    found.append(model(tokens[:, -3:], cache))
    if model.args.has_mtp:
        drafts = model.make_mtp_cache()
        for i in range(2):
            drafted, hidden, _ = model.draft(tokens[:, i : i + 1], hidden[:, -1:], drafts)
            found.append(drafted)
    padding = [0, 5]
    batch = [CacheList(*(BatchKVCache(padding) for _ in layer.caches)) for layer in cache]
    pair = mx.concatenate([tokens[:, :20], tokens[:, 20:40]])
    found.append(model(pair, batch)[:, -1:])
    found.append(model(pair[:, :1], batch))
    mx.eval(found)
    return found


def bits(arrays):
    """The bits of arrays of floats, by number."""
    kinds = {2: mx.uint16, 4: mx.uint32}
    return {str(i): np.array(a.view(kinds[a.dtype.size])) for i, a in enumerate(arrays)}


class ByColumns(nn.Module):
    """A matrix of which each rank takes some columns; their products are added."""

    def __init__(self, weight, ranks, group):
        super().__init__()
        columns = weight.planes[0].shape[-1] * 32 // weight.format.bits
        first, end = (columns * r // ranks.size // 64 * 64 for r in (ranks.rank, ranks.rank + 1))
        self._of_x = slice(first, end)
        self._group = group
        planes = [
            mx.contiguous(p[:, first * p.shape[1] // columns : end * p.shape[1] // columns])
            for p in weight.planes
        ]
        self._weight = ops.Weight(planes, weight.format)

    def __call__(self, x):
        part = ops.quantized_matvec(mx.contiguous(x[..., self._of_x]), self._weight)
        return mx.distributed.all_sum(part, group=self._group)


def split_by_columns(model, path, ranks, group):
    """Have each rank take some columns of a matrix of the first layer."""
    whole, _ = load_model(path, lazy=True)
    weight = whole.layers[0].self_attn.o_proj.as_weight()
    model.layers[0].self_attn.o_proj = ByColumns(weight, ranks, group)


def counted_steps():
    """A list that gets the gathers of each recorded step that is made from now on."""
    counted, made = [], Ranks.made

    def count(ranks, last, traffic):
        counted.append(traffic.gathers)
        made(ranks, last, traffic)

    Ranks.made = count
    return counted


def leave_gathers_out():
    """Have recorded steps take what a rank computed for what all others did, too."""
    apart = Ranks.apart

    def alone(ranks, make):
        with ranks.alone():
            return apart(ranks, make)

    Ranks.apart = alone


def main(folder, split, *paths):
    mtp = os.environ.get("MTP") != "0"
    mx.set_default_device(mx.cpu)
    never = split in ("recorded", "unjoined")
    sharded_indexer.CPU = sharded_indexer.Price(1 << 62 if never else -(1 << 62), 0)
    recorded = counted_steps()
    if split == "unjoined":
        leave_gathers_out()
    group = mx.distributed.init(strict=True, backend="ring")
    for path in map(Path, paths):
        ranks = Ranks(group)
        opened = open_model(path, "auto", None, mtp=mtp, ranks=ranks)
        opened.read()
        model = opened.model
        if split == "columns":
            split_by_columns(model, path, ranks, group)
        elif ranks.rank == 0:
            with ranks.alone():
                mx.eval(model(mx.arange(8)[None]))  # waits for nobody
        recorded.clear()
        found = bits(steps_of(model))
        if never:
            found["recorded"] = np.array(len(recorded))
        np.savez(f"{folder}/{path.name}.{ranks.rank}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
