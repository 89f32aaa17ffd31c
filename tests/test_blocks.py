"""Halves of a layer as single nodes: the bits of their ops one by one, errors, gradients, nodes."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from formats_under_test import (
    DTYPES,
    FORMATS,
    OURS,
    SMALL_GGUFS,
    assert_same_bits,
    random_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.lora import LoRALinear

import glm_fused
from glm_fused import ops, reference_path
from glm_fused.loader import load_model
from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model
from glm_fused.ops import blocks

pytestmark = pytest.mark.usefixtures("several_threads")

EACH = [*FORMATS, *OURS, *SMALL_GGUFS]
ROUTING = dict(top_k=3, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_a_cpu():
    if mx.default_device() != mx.cpu:
        pytest.skip("blocks are a CPU's")


class Layer:
    """Random arrays and weights for the ops of a layer."""

    def __init__(self, seed, fmt, dtype):
        self.rng, self.fmt, self.dtype = np.random.default_rng(seed), fmt, dtype

    def array(self, *shape):
        values = self.rng.standard_normal(shape, dtype=np.float32)
        return mx.array(values).astype(self.dtype)

    def norm(self, n, eps=EPS):
        return self.array(n) + 1, eps

    def weight(self, *shape):
        return random_weight(self.rng, shape, self.fmt, self.dtype)

    def mlp(self, hidden, intermediate, *experts):
        gate, up = (self.weight(*experts, intermediate, hidden) for _ in range(2))
        return gate, up, self.weight(*experts, hidden, intermediate)


def mlp_chain(x, weights, reference):
    gate, up = (ops.quantized_matvec(x, w, reference=reference) for w in weights[:2])
    return ops.quantized_matvec(ops.swiglu(gate, up), weights[2], reference=reference)


def normed(x, norm, reference):
    return ops.rms_norm(x, *norm, reference=reference)


def tokens(data):
    b = data.draw(st.integers(1, 4))
    return b, data.draw(st.integers(1, blocks.MAX_TOKENS // b))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mlp_block(data):
    fmt, dtype = (data.draw(st.sampled_from(v)) for v in (EACH, list(DTYPES.values())))
    layer = Layer(data.draw(st.integers(0, 2**32 - 1)), fmt, dtype)
    x, norm, weights = layer.array(*tokens(data), 256), layer.norm(256), layer.mlp(256, 128)
    found = blocks.mlp_block(x, norm, weights)
    mx.eval(found)
    for reference in (False, True):
        h = normed(x, norm, reference)
        assert_same_bits(found, x + mlp_chain(h, weights, reference))
    # The control: another eps is another result.
    other = blocks.mlp_block(x, (norm[0], 1.0), weights)
    with pytest.raises(AssertionError):
        assert_same_bits(found, other)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_moe_block(data):
    fmt, dtype = (data.draw(st.sampled_from(v)) for v in (EACH, list(DTYPES.values())))
    layer = Layer(data.draw(st.integers(0, 2**32 - 1)), fmt, dtype)
    x, norm, router = layer.array(*tokens(data), 256), layer.norm(256), layer.array(7, 256)
    bias = mx.array(layer.rng.standard_normal(7, dtype=np.float32))
    experts, shared = layer.mlp(256, 128, 7), layer.mlp(256, 256)
    if data.draw(st.booleans()):
        shared = None
    found = blocks.moe_block(x, norm, (router, bias), experts, shared, **ROUTING)
    mx.eval(found)
    for reference in (False, True):
        h = normed(x, norm, reference).reshape(-1, 256)
        slots, scores = ops.router_topk(h, router, bias, **ROUTING, reference=reference)
        y = ops.moe_decode(h, *experts, slots, scores, reference=reference)
        if shared is not None:
            y = y + mlp_chain(h, shared, reference)
        assert_same_bits(found, x + y.reshape(x.shape))


HEADS, NOPE, ROPE, RANK, VALUES, Q_RANK = 4, 128, 16, 128, 128, 128
INDEX_HEADS, INDEX_DIM = 4, 32


def attention_arguments(layer, b, length, full, scores, interleaved):
    heads = HEADS
    angles = layer.rng.uniform(0, 6, (b, 1, length, ROPE // 2)).astype(np.float32)
    arguments = [
        layer.array(b, length, 256), mx.array(np.cos(angles)), mx.array(np.sin(angles)),
        layer.norm(256), layer.weight(Q_RANK, 256), layer.norm(Q_RANK, 1e-6),
        layer.weight(heads * (NOPE + ROPE), Q_RANK), layer.weight(RANK + ROPE, 256),
        layer.norm(RANK, 1e-6), layer.weight(heads, RANK, NOPE), NOPE,
    ]  # fmt: skip
    if not full:
        return [*arguments, None]
    indexer = blocks.IndexerArguments(
        layer.weight(INDEX_DIM, 256), layer.norm(INDEX_DIM, 1e-6), layer.array(INDEX_DIM),
        layer.weight(INDEX_HEADS * INDEX_DIM, Q_RANK), layer.weight(INDEX_HEADS, 256),
        INDEX_HEADS, interleaved, scores,
    )  # fmt: skip
    return [*arguments, indexer]


def attention_chain(
    reference, x, cos, sin, norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, embed_q, nope, indexer
):
    def matvec(x, w):
        return ops.quantized_matvec(x, w, reference=reference)

    def rotate(x, interleaved=True):
        return ops.rotate(x, cos, sin, interleaved, reference=reference)

    b, length, _ = x.shape
    h = normed(x, norm, reference)
    q_latent = normed(matvec(h, q_a), q_a_norm, reference)
    q = matvec(q_latent, q_b).reshape(b, length, HEADS, -1).swapaxes(1, 2)
    latents, k_pe = mx.split(matvec(h, kv_a)[:, None], [RANK], axis=-1)
    queries = mx.concatenate([matvec(q[..., :nope], embed_q), rotate(q[..., nope:])], axis=-1)
    out = [queries.swapaxes(1, 2), normed(latents, kv_a_norm, reference), rotate(k_pe)]
    if indexer is not None:
        k = ops.layer_norm(
            matvec(h, indexer.wk), indexer.k_norm[0], indexer.k_norm_bias, indexer.k_norm[1],
            reference=reference,
        )  # fmt: skip
        out.append(rotate(k[:, None], indexer.interleaved))
        if indexer.scores:
            q = matvec(q_latent, indexer.wq_b).reshape(b, length, INDEX_HEADS, INDEX_DIM)
            out.append(rotate(q.swapaxes(1, 2), indexer.interleaved).swapaxes(1, 2))
            out.append(matvec(h.astype(mx.float32), indexer.weights_proj))
    return out


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_attention_project(data):
    fmt, dtype = (data.draw(st.sampled_from(v)) for v in (EACH, list(DTYPES.values())))
    layer = Layer(data.draw(st.integers(0, 2**32 - 1)), fmt, dtype)
    flags = [data.draw(st.booleans()) for _ in range(3)]
    arguments = attention_arguments(layer, *tokens(data), *flags)
    found = blocks.attention_project(*arguments)
    mx.eval(found)
    for reference in (False, True):
        expected = attention_chain(reference, *arguments)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert_same_bits(a, mx.contiguous(b))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_attention_output(data):
    fmt, dtype = (data.draw(st.sampled_from(v)) for v in (EACH, list(DTYPES.values())))
    layer = Layer(data.draw(st.integers(0, 2**32 - 1)), fmt, dtype)
    b, length = tokens(data)
    x = layer.array(b, length, 256)
    attended = layer.array(b, length, HEADS, RANK).astype(mx.float32)
    unembed, o_proj = layer.weight(HEADS, VALUES, RANK), layer.weight(256, HEADS * VALUES)
    found = blocks.attention_output(x, attended, unembed, o_proj)
    mx.eval(found)
    for reference in (False, True):
        heads = attended.swapaxes(1, 2).astype(dtype)
        values = ops.quantized_matvec(heads, unembed, reference=reference)
        rows = values.swapaxes(1, 2).reshape(b, length, -1)
        assert_same_bits(found, x + ops.quantized_matvec(rows, o_proj, reference=reference))


def test_inputs_of_any_strides():
    """Rows that do not lie back to back are copied first."""
    layer = Layer(5, ("affine", 4, 64), mx.bfloat16)
    norm, weights = layer.norm(256), layer.mlp(256, 128)
    x = layer.array(3, 2, 512)[..., ::2].swapaxes(0, 1)
    found = blocks.mlp_block(x, norm, weights)
    assert_same_bits(found, blocks.mlp_block(mx.contiguous(x), norm, weights))


def test_gradients_are_those_of_the_chain():
    layer = Layer(6, ("affine", 4, 64), mx.float32)
    x, norm, weights = layer.array(1, 3, 256), layer.norm(256), layer.mlp(256, 128)

    def block(x, scale):
        return mx.sin(blocks.mlp_block(x, (scale, EPS), weights)).sum()

    def chain(x, scale):
        return mx.sin(x + mlp_chain(ops.rms_norm(x, scale, EPS), weights, False)).sum()

    found, expected = (mx.grad(f, (0, 1))(x, norm[0]) for f in (block, chain))
    for a, b in zip(found, expected, strict=True):
        assert mx.abs(b).max().item() > 0
        assert mx.allclose(a, b, 1e-4, 1e-5).item()


def test_errors_name_the_op_and_its_argument():
    layer = Layer(7, ("affine", 4, 64), mx.bfloat16)
    norm, weights = layer.norm(256), layer.mlp(256, 128)
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight must have shape \(128\)"):
        blocks.mlp_block(layer.array(1, 1, 128), norm, weights)
    with pytest.raises(ValueError, match=r"\[quantized_matvec\] w\.weight must have"):
        blocks.mlp_block(layer.array(1, 1, 256), norm, (weights[0], weights[1], weights[0]))
    with pytest.raises(ValueError, match=r"\[mlp_block\] gate must have 3 planes"):
        bad = weights[0]._replace(planes=weights[0].planes[:2])
        blocks.mlp_block(layer.array(1, 1, 256), norm, (bad, *weights[1:]))


def test_a_router_of_more_experts_than_there_are():
    """Its slots would be looked at before they are computed, so none beyond the last may come."""
    layer = Layer(8, ("affine", 4, 64), mx.bfloat16)
    norm, experts = layer.norm(256), layer.mlp(256, 128, 3)
    router = layer.array(4, 256), mx.zeros((4,))
    with pytest.raises(ValueError, match=r"\[moe_block\] router must be .* has shape \(4,256\)"):
        blocks.moe_block(layer.array(1, 1, 256), norm, router, experts, None, **ROUTING)


def test_who_is_given_blocks(monkeypatch):
    def takes(b, length):
        return blocks.takes(mx.zeros((b, length, 8)))

    assert takes(1, 1) and takes(4, 4) and not takes(1, 17) and not takes(3, 6)
    with reference_path():
        assert not takes(1, 1)


def run(model, prompt, steps):
    """Logits after a prompt and of greedy steps, with a cache that is trimmed on the way."""
    cache = model.make_cache()
    logits = [model(prompt, cache)]
    for step in range(steps):
        logits.append(model(mx.argmax(logits[-1][:, -1:], axis=-1), cache))
        if step == steps // 2:
            for entry in cache:
                entry.trim(3)
    mx.eval(logits)
    return logits


FOLDERS = {
    "bf16": ("mlx", None, {}),
    "affine4": ("mlx", {"group_size": 32, "bits": 4}, {}),
    "mxfp8": ("hf", {"group_size": 32, "bits": 8, "mode": "mxfp8"}, {}),
    "fp8": ("fp8", None, {}),
    "not interleaved": ("mlx", None, {"indexer_rope_interleave": False}),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
def test_whole_models(tmp_path, monkeypatch, name, kv_format):
    layout, quantization, sizes = FOLDERS[name]
    path = write_checkpoint(
        tmp_path, tiny_config(**sizes), layout=layout, quantization=quantization
    )
    model, _ = load_model(path, kv_format=kv_format)
    prompt = mx.array(np.random.default_rng(2).integers(0, 256, (2, 20)))
    found = run(model, prompt, 24)
    with reference_path():
        expected = run(model, prompt, 24)
    monkeypatch.setattr(blocks, "takes", lambda *_: False)
    for a, b, c in zip(found, expected, run(model, prompt, 24), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


def test_biases_and_adapters_are_left_to_the_ops():
    biased = Model(args_from_config(tiny_config(attention_bias=True)))
    assert not any(layer.self_attn.is_recordable() for layer in biased.layers)
    tokens, layer = mx.array([[3, 5, 7]]), biased.layers[1].self_attn
    before = biased(tokens)
    layer.o_proj.bias = mx.ones(layer.o_proj.bias.shape)
    assert mx.abs(biased(tokens) - before).max().item() > 0
    model = Model(args_from_config(tiny_config()))
    assert all(layer.self_attn.is_recordable() for layer in model.layers)
    layer = model.layers[0].self_attn
    layer.o_proj = LoRALinear.from_base(layer.o_proj, r=4)
    assert not layer.is_recordable()


def nodes(tmp_path, *outputs):
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), *outputs)
    return re.findall(r'label ?= ?"([A-Za-z0-9_]+)"', Path(file).read_text())


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_step_has_few_nodes(tmp_path, monkeypatch, kv_format, recorded):
    """Of the bundled model's seven layers; op by op it has more than 400."""
    model, tokenizer = glm_fused.load("demo")
    model.kv_format = kv_format
    cache = model.make_cache()
    mx.eval(model(mx.array([tokenizer.encode("def main():" * 40)]), cache))
    if not recorded:
        monkeypatch.setattr(model._steps, "run", lambda *_: None)
    found = nodes(tmp_path, model(mx.array([[5]]), cache))
    if recorded:
        assert found.count("DecodeStep") == 1
        assert len(found) <= 40  # the others embed the token, and make angles
        return
    assert {found.count(name) for name in ("AttentionProject", "AttentionOutput")} == {7}
    assert found.count("MoeBlock") + found.count("MlpBlock") == 7
