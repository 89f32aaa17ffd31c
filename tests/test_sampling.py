"""Extreme temperatures and nuclei behave as their limits; usual ones have mlx-lm's bits."""

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler

from glm_fused.generation.sampling import shaper

VOCABULARY = 1000
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def logprobs(dtype, seed=0):
    """The log-probabilities of a flat distribution, the best of which is far below 0."""
    x = mx.random.normal((1, VOCABULARY), key=mx.random.key(seed)).astype(dtype)
    return x - mx.logsumexp(x, keepdims=True)


def draws(sample, x, count=20):
    mx.random.seed(5)
    return [sample(x).item() for _ in range(count)]


def sampler(temp, top_p):
    shape = shaper(temp, top_p)
    return lambda x: mx.random.categorical(shape(x))


# MLX compiles anew for each value of top_p, which takes a second each.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temp", "top_p"), [(1e-5, 1.0), (5e-324, 1.0), (1.0, 1e-300)])
def test_tiny_values_are_greedy(dtype, temp, top_p):
    x = logprobs(dtype)
    best = set(mx.where(x == x.max(), mx.arange(VOCABULARY), -1).tolist()[0]) - {-1}
    assert set(draws(sampler(temp, top_p), x)) <= best


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("temp", [1e9, 1e300])
def test_huge_temperatures_choose_among_the_nucleus(dtype, temp):
    x = logprobs(dtype)
    chosen = draws(sampler(temp, 0.2), x, 50)
    best = set(mx.argsort(x[0])[-100:].tolist())
    assert len(set(chosen)) > 10
    assert set(chosen) <= best


@pytest.mark.parametrize("temp", [1e-3, 0.4, 1e3])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.0])
def test_usual_values_are_mlx_lms(temp, top_p):
    x = logprobs(mx.bfloat16)
    assert draws(sampler(temp, top_p), x) == draws(make_sampler(temp, top_p), x)
