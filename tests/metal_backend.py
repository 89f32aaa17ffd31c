"""Where tests run ops that have Metal kernels: a Mac's GPU, or the simulated host."""

import contextlib

import mlx.core as mx
import pytest

from glm_fused import metal_sim

GPU = mx.metal.is_available()
simulated_only = pytest.mark.skipif(GPU, reason="tells of the simulator's launches")


@contextlib.contextmanager
def metal(trace=False):
    """Ops with Metal kernels run them inside, on whatever there is."""
    if GPU:
        yield
        return
    reason = metal_sim.unavailable()
    if reason:
        pytest.fail(reason)
    metal_sim.take_launches()
    with metal_sim.simulated(trace=trace):
        yield


@contextlib.contextmanager
def cpu():
    """Everything runs on the CPU inside."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def on_both(op):
    """The op's arrays by Metal and by the CPU."""
    with metal():
        there = op()
        mx.eval(there)
    with cpu():
        here = op()
        mx.eval(here)
    return there, here
