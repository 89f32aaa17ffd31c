"""A prompt has the same logits, bit for bit, however many of its tokens are taken at once."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from metal_backend import cpu

from glm_fused import ops
from glm_fused.formats.weights import Weight
from glm_fused.loader import load_model

pytestmark = pytest.mark.usefixtures("several_threads")

LENGTH = 75  # nine panels of eight vectors and some left over, past index_topk
CHUNKS = [33, 16, 9, 7, 1]
AFFINE = [{"mode": "affine", "bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)]
FP = [
    {"mode": mode, "bits": bits, "group_size": group}
    for mode, bits, group in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
]


def logits(model, chunk):
    """Their bits, of a prompt that is fed ``chunk`` tokens at a time."""
    tokens = mx.array(np.random.default_rng(1).integers(0, 256, (1, LENGTH)))
    kv = model.make_cache()
    parts = [model(tokens[:, lo : lo + chunk], kv) for lo in range(0, LENGTH, chunk)]
    return np.array(mx.concatenate(parts, axis=1).view(mx.uint16))


@pytest.fixture(
    params=[None, *AFFINE, *FP], ids=lambda q: f"{q['mode']}{q['bits']}" if q else "bf16"
)
def model(request, tmp_path):
    write_checkpoint(tmp_path, tiny_config(index_topk=16), quantization=request.param)
    with cpu():
        yield load_model(tmp_path)[0]


@pytest.mark.parametrize("kv_format", ["auto", "fp8", "int8"])
def test_cached_rows(tmp_path, kv_format):
    write_checkpoint(tmp_path, tiny_config(index_topk=16), quantization=AFFINE[2])
    with cpu():
        model, _ = load_model(tmp_path, kv_format=kv_format)
        whole = logits(model, LENGTH)
        for chunk in CHUNKS:
            assert np.array_equal(logits(model, chunk), whole), chunk


def test_weights(model):
    whole = logits(model, LENGTH)
    for chunk in CHUNKS:
        assert np.array_equal(logits(model, chunk), whole), chunk


def test_another_order_is_caught(tmp_path, monkeypatch):
    """The control: a projection of many rows that adds in an order of its own."""
    write_checkpoint(tmp_path, tiny_config(index_topk=16), quantization=None)
    matvec = ops.quantized_matvec

    def matmul(x, w: Weight, **options):
        if w.format.mode == "dense" and w.planes[0].ndim == 2 and x.shape[-2] > 8:
            rows = x.astype(mx.float32) @ w.planes[0].astype(mx.float32).T
            return rows.astype(x.dtype)
        return matvec(x, w, **options)

    with cpu():
        model, _ = load_model(tmp_path)
        whole = logits(model, LENGTH)
        monkeypatch.setattr(ops, "quantized_matvec", matmul)
        assert not np.array_equal(logits(model, LENGTH), whole)
