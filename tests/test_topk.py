"""topk_indices agrees with a stable sort, where ties are the rule."""

import mlx.core as mx
import numpy as np
import pytest

from glm_fused.ops.topk import topk_indices

RNG = np.random.default_rng(0)


def reference(scores: np.ndarray, k: int) -> np.ndarray:
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    return np.sort(best, axis=-1)


CASES = {
    "distinct": RNG.permutation(300).astype(np.float32),
    "all zero": np.zeros(300, np.float32),
    "signed zeros": RNG.choice(np.array([0.0, -0.0], np.float32), 300),
    "relu plateau": np.maximum(RNG.normal(size=(3, 4, 300)), 0).astype(np.float32),
    "three values": RNG.integers(-1, 2, (5, 300)).astype(np.float32),
    "mostly masked": np.where(RNG.random((4, 300)) < 0.95, -np.inf, 1).astype(np.float32),
    "all masked": np.full(300, -np.inf, np.float32),
    "infinite": np.where(RNG.random(300) < 0.5, np.inf, 0).astype(np.float32),
    "descending": np.arange(300, 0, -1, dtype=np.float32),
    "neighbours": np.nextafter(np.ones(300, np.float32), RNG.choice([0, 2], 300)).astype("f4"),
}


@pytest.mark.parametrize("k", [1, 2, 24, 150, 299, 300])
@pytest.mark.parametrize("name", CASES)
def test_lowest_index_wins(name, k):
    indices = topk_indices(mx.array(CASES[name]), k)
    assert indices.dtype == mx.int32
    assert np.array_equal(np.array(indices), reference(CASES[name], k))


def test_nan_loses_to_numbers():
    scores = mx.array([float("nan"), 1.0, float("nan"), -2.0, 0.0])
    assert topk_indices(scores, 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("k", [0, 6, -1])
def test_bad_k(k):
    with pytest.raises(ValueError, match="from 1 to 5"):
        topk_indices(mx.zeros((5,)), k)
