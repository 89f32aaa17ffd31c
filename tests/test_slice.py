"""The benchmarks' slice of GLM-5.2 has the same weights in our formats and in llama.cpp's."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as decode

from glm_fused.formats.weights import FORMATS, Weight, dequantize
from glm_fused.host import to_numpy

SHAPE = (3, 64, 192)


@pytest.fixture(scope="module")
def slices():
    """The modules that make the slice, for us and for llama.cpp."""
    bench = Path(__file__).parents[1] / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(bench)])
        import glm52_slice
        from peers import llama_slice
    return glm52_slice, llama_slice


def in_all_formats(slices, path, written):
    """The values of a module in every format; llama.cpp's are of nibbles ``written``."""
    ours, llama = slices
    scale = ours.scale(SHAPE)
    planes = [plane.reshape(-1, plane.shape[-1]) for plane in ours.affine4(path, SHAPE, mx.float32)]
    return {
        "bf16": to_numpy(ours.floats(path, SHAPE, mx.bfloat16).astype(mx.float32)),
        "float32": to_numpy(ours.floats(path, SHAPE, mx.float32)),
        "affine4": to_numpy(dequantize(Weight(planes, FORMATS["affine4"]), mx.float32)),
        "Q4_0": decode(llama.q4_0(written, scale), GGMLQuantizationType.Q4_0),
        "BF16": (llama.floats(written, scale, "BF16").astype(np.uint32) << 16).view(np.float32),
        "F16": llama.floats(written, scale, "F16").view(np.float16).astype(np.float32),
    }


def test_every_format_has_the_same_values(slices):
    path = "model.layers.1.self_attn.embed_q"
    nibbles = slices[0].packed_codes(path, SHAPE)
    found = in_all_formats(slices, path, nibbles)
    values = found["float32"]
    assert 0.5 < values.std() * SHAPE[-1] ** 0.5 < 2 and abs(values.mean()) < 0.1 * values.std()
    assert {name for name, held in found.items() if (held.reshape(SHAPE) != values).any()} == set()
    nibbles[1, 2, 3] ^= 0x10  # one column of another value is seen
    found = in_all_formats(slices, path, nibbles)
    apart = {name: int((held.reshape(SHAPE) != values).sum()) for name, held in found.items()}
    assert apart == {"bf16": 0, "float32": 0, "affine4": 0, "Q4_0": 1, "BF16": 1, "F16": 1}


def test_llama_cpp_gets_every_module_under_a_name_of_its_own(slices):
    ours, llama = slices
    size = ours.Slice(layers=3, experts=8, vocabulary=256)
    kinds = {tensor.name: tensor.type.name for _, tensor in llama.tensors(size, "Q4_0")}
    assert len(kinds) == len(list(llama.tensors(size, "Q4_0")))
    assert kinds["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    assert kinds["blk.0.indexer.k_norm.bias"] == "F32"
    assert kinds["blk.0.indexer.attn_k.weight"] == "BF16"
    assert not any(name.startswith("blk.1.indexer") for name in kinds)  # it shares a selection
