"""A model and a cache between two decode steps."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
from conftest import tiny_config, write_checkpoint
from formats_under_test import assert_same_bits
from mlx_lm.models.cache import BatchKVCache, CacheList

from glm_fused import reference_path
from glm_fused.loader import load_model


def load_tiny(folder):
    """A model whose indexer leaves keys out from the seventeenth on."""
    quantization = {"group_size": 32, "bits": 4}
    config = tiny_config(index_topk=16)
    return load_model(write_checkpoint(folder, config, quantization=quantization))[0]


class Between:
    """A model and a cache between two steps, of which the first is maybe not evaluated yet."""

    def __init__(self, loaded, kv_format="auto", rows=20, batch=None, pending=False):
        self.model = copy.deepcopy(loaded)
        self.model.kv_format = kv_format
        self.cache = self.model.make_cache()
        if batch is not None:
            entries = [[BatchKVCache([0] * batch) for _ in layer.caches] for layer in self.cache]
            self.cache = [CacheList(*layer) for layer in entries]
        self.batch = batch or 1
        tokens = np.random.default_rng(rows).integers(0, 250, (self.batch, rows))
        mx.eval(self.model(mx.array(tokens), self.cache))
        logits = self.step(7)
        if not pending:
            mx.eval(logits)

    @property
    def entries(self):
        return [entry for layer in self.cache for entry in layer.caches]

    def step(self, *tokens):
        return self.model(mx.array([tokens] * self.batch), self.cache)

    def check(self, *tokens):
        """Take a step, which is to have the bits of the reference path on a copy of the cache."""
        kept = copy.deepcopy(self.cache)
        with reference_path():
            expected = self.model(mx.array([tokens] * self.batch), kept)
            mx.eval(expected)
        assert_same_bits(self.step(*tokens), expected)
