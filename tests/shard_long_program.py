"""A rank of a model: some texts, or steps on the simulated GPU, saved in ``FOLDER/RANK.npz``.

``python shard_long_program.py FOLDER SPLIT short|long|metal MODEL [FORMAT...]``, where SPLIT is one
of shard_program.py's: with ``recorded`` decode steps are recorded, else the indexer's scores are
shared out wherever they can be.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
from metal_backend import GPU, metal
from mlx_lm.models.cache import BatchKVCache, CacheList
from shard_program import bits, counted_steps, split_by_columns, steps_of

from glm_fused.loader import open_model
from glm_fused.models import sharded_indexer
from glm_fused.models.ranks import Ranks
from glm_fused.ops import metal_sim

CHUNK, DECODED, SIMULATED = 512, 300, 16
ALWAYS, NEVER = (sharded_indexer.Price(gather, 0) for gather in (-(1 << 62), 1 << 62))


def texts_of(model, kv_formats):
    """The logits of long texts in each format of caches: prompts, greedy tokens and batches."""
    found = []
    for number, kv_format in enumerate(kv_formats):
        model.kv_format = kv_format
        rng = np.random.default_rng(number)
        length = 20 * model.args.index_topk
        tokens = mx.array(rng.integers(0, model.args.vocab_size, (3, length)))
        found += text_of(model, tokens[:1], model.make_cache(), DECODED if number == 0 else 30)
        batch = [
            CacheList(*(BatchKVCache([0, 7, 300]) for _ in layer.caches))
            for layer in model.make_cache()
        ]
        found += text_of(model, tokens[:, : length // 2], batch, 10)
    return found


def text_of(model, prompt, cache, decoded):
    """The logits of the last tokens of a prompt's chunks, and of so many greedy tokens."""
    found = []
    for first in range(0, prompt.shape[1], CHUNK):
        found.append(model(prompt[:, first : first + CHUNK], cache)[:, -4:])
        mx.eval(found[-1], [layer.state for layer in cache])
    for _ in range(decoded):
        found.append(model(mx.argmax(found[-1][:, -1:], axis=-1), cache))
        mx.async_eval(found[-1])
    mx.eval(found)
    return found


def simulated_of(model):
    """The logits of a prompt on the CPU, and of tokens that a simulated GPU decodes from there."""
    prompt = mx.arange(3 * model.args.index_topk)[None] % model.args.vocab_size
    cache = model.make_cache()
    found = text_of(model, prompt, cache, 0)
    with metal():
        for _ in range(SIMULATED):
            found.append(model(mx.argmax(found[-1][:, -1:], axis=-1), cache))
            mx.eval(found[-1])
        assert GPU or len(metal_sim.take_launches()) > 10 * SIMULATED
    return found


def what_of(model, what, kv_formats):
    if what == "long":
        return texts_of(model, kv_formats)
    return simulated_of(model) if what == "metal" else steps_of(model)


def main(folder, split, what, path, *kv_formats):
    mx.set_default_device(mx.cpu)
    sharded_indexer.CPU = sharded_indexer.GPU = NEVER if split == "recorded" else ALWAYS
    recorded = counted_steps()
    group = mx.distributed.init(strict=True, backend="ring")
    ranks = Ranks(group)
    opened = open_model(path, "auto", None, ranks=ranks)
    opened.read()
    if split == "columns":
        split_by_columns(opened.model, path, ranks, group)
    found = what_of(opened.model, what, kv_formats)
    np.savez(f"{folder}/{ranks.rank}.npz", recorded=len(recorded), **bits(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
