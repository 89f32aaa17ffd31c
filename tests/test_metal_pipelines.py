"""When kernels are looked up and compiled: once, and before the first token."""

import mlx.core as mx
from metal_backend import metal, simulated_only
from test_metal_launches import CACHED, model

from glm_fused.ops import metal_sim

pytestmark = simulated_only


def prompted():
    """A cache with more tokens than an indexer keeps."""
    cache = model().make_cache()
    mx.eval(model()(mx.zeros((1, CACHED), mx.int32), cache))
    return cache


class Asked:
    """A compiler that runs nothing, and knows the libraries that it was asked for."""

    def __init__(self):
        self._names = []

    def __call__(self, name, text):
        self._names.append(name)

    def by(self, cache, tokens):
        """The libraries that a step of so many tokens asks for."""
        self._names.clear()
        mx.eval(model()(mx.array([[1] * tokens]), cache))
        return list(self._names)


def test_a_kernel_is_asked_for_once():
    cache, asked = prompted(), Asked()
    with metal(compiler=asked):
        first = asked.by(cache, 1)
        metal_sim.take_launches()
        assert len(first) == len(set(first)) > 8
        assert asked.by(cache, 1) == []
        assert len(metal_sim.take_launches()) > 2 * len(first)
    with metal(compiler=asked):  # other settings are another device
        assert asked.by(cache, 1) == first
