"""Gradients of the ops, and of a whole model, against the same computation in dense float32."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_mlx_lm import CONFIG, PROMPT, TYPES
from tests.formats_under_test import OURS, SMALL_GGUFS, dequantized, format_id, random_weight

from glm_fused import ops
from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model
from glm_fused.ops import stock

FORMATS = [
    ("affine", 4, 64), ("affine", 3, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16),
    ("dense", 0, 0), *OURS, *SMALL_GGUFS[:2],
]  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def assert_close(found: list[mx.array], expected: list[mx.array], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        scale = mx.abs(b).max().item()
        assert scale > 0
        assert mx.abs(a - b).max().item() <= tolerance * scale


def dense(weight: ops.Weight) -> mx.array:
    return mx.array(dequantized(weight).astype("float32"))


def experts_by_hand(x, gate, up, down, slots, scores):
    act = x[:, None, None] @ gate[slots].swapaxes(-1, -2)
    act = act * mx.sigmoid(act) * (x[:, None, None] @ up[slots].swapaxes(-1, -2))
    return ((act @ down[slots].swapaxes(-1, -2))[:, :, 0] * scores[..., None]).sum(axis=1)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
@pytest.mark.parametrize("heads", [None, 3])
def test_quantized_matvec(rng, fmt, heads):
    shape = (136, 128) if heads is None else (heads, 136, 128)
    weight = random_weight(rng, shape, fmt, mx.float32)
    x = mx.array(rng.standard_normal((2, heads or 1, 5, 128), dtype="float32"))
    w = dense(weight)
    found = mx.grad(lambda x: mx.sin(ops.quantized_matvec(x, weight)).sum())(x)
    expected = mx.grad(lambda x: mx.sin(x @ w.swapaxes(-1, -2)).sum())(x)
    assert_close([found], [expected])


def test_dense_weight_is_trained(rng):
    x = mx.array(rng.standard_normal((5, 64), dtype="float32"))
    w = mx.array(rng.standard_normal((24, 64), dtype="float32"))
    found = mx.grad(lambda w: mx.sin(ops.quantized_matvec(x, ops.Weight.dense(w))).sum())(w)
    assert_close([found], [mx.grad(lambda w: mx.sin(x @ w.T).sum())(w)])


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
def test_moe_decode(rng, fmt):
    gate, up = (random_weight(rng, (6, 128, 256), fmt, mx.float32) for _ in range(2))
    down = random_weight(rng, (6, 256, 128), fmt, mx.float32)
    x = mx.array(rng.standard_normal((7, 256), dtype="float32"))
    slots = mx.array(rng.integers(0, 6, (7, 3)).astype("int32"))
    scores = mx.array(rng.random((7, 3), dtype="float32"))

    def plain(x, scores):
        weights = dense(gate), dense(up), dense(down)
        return mx.sin(experts_by_hand(x, *weights, slots, scores)).sum()

    expected = mx.grad(plain, (0, 1))(x, scores)
    for chain in (ops.moe_decode, stock.moe_decode):

        def fused(x, scores, chain=chain):
            return mx.sin(chain(x, gate, up, down, slots, scores)).sum()

        assert_close(mx.grad(fused, (0, 1))(x, scores), expected, 1e-4)


@pytest.mark.parametrize("normed", [True, False])
def test_router_topk(rng, normed):
    x = mx.array(rng.standard_normal((9, 32), dtype="float32"))
    w = mx.array(rng.standard_normal((16, 32), dtype="float32"))
    bias = mx.array(rng.standard_normal(16, dtype="float32"))
    options = dict(top_k=4, norm_topk_prob=normed, routed_scaling_factor=2.5)
    chosen, _ = ops.router_topk(x, w, bias, **options)

    def fused(x, w):
        return mx.sin(ops.router_topk(x, w, bias, **options)[1]).sum()

    def plain(x, w):
        scores = mx.take_along_axis(mx.sigmoid(x @ w.T), chosen, axis=1)
        return mx.sin(scores / (scores.sum(axis=1, keepdims=True) if normed else 1) * 2.5).sum()

    assert_close(mx.grad(fused, (0, 1))(x, w), mx.grad(plain, (0, 1))(x, w))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("selected", [False, True])
def test_sparse_mla_decode(rng, selected, padded):
    """Queries see what the kernel shows them, and no key outside has a gradient."""
    b, length, heads, total, rank, rope = 2, 5, 3, 8, 32, 8
    q = mx.array(rng.standard_normal((b, length, heads, rank + rope), dtype="float32"))
    latents = mx.array(rng.standard_normal((b, total, rank), dtype="float32"))
    ropes = mx.array(rng.standard_normal((b, total, rope), dtype="float32"))
    start = mx.array([2, 4]) if padded else None
    columns, queries = mx.arange(total), mx.arange(total - length, total)[:, None]
    seen = (columns <= queries) & (columns >= (0 if start is None else start[:, None, None]))
    choice = None
    if selected:
        choice = mx.array([[[0, 3, 4, -1]] * length, [[1, 5, 6, 7]] * length])
        seen = seen & (choice[..., None] == columns).any(axis=-2)
    seen = mx.broadcast_to(seen, (b, length, total))[:, :, None]

    def fused(q, latents, ropes):
        out = ops.sparse_mla_decode(q, latents, ropes, choice, rank=rank, scale=0.2, start=start)
        return mx.sin(out).sum()

    def plain(q, latents, ropes):
        rows = mx.concatenate([latents, ropes], axis=-1)
        scores = mx.where(seen, mx.einsum("blhw,btw->blht", q, rows) * 0.2, -1e30)
        weights = mx.where(seen, mx.softmax(scores, axis=-1), 0.0)
        return mx.sin(mx.einsum("blht,btr->blhr", weights, latents)).sum()

    every = (0, 1, 2)
    assert abs((fused(q, latents, ropes) - plain(q, latents, ropes)).item()) < 1e-3
    assert_close(mx.grad(fused, every)(q, latents, ropes), mx.grad(plain, every)(q, latents, ropes))


def test_steps_of_the_unfused_chain(rng):
    gate, up = (mx.array(rng.standard_normal((4, 3, 16), dtype="float32")) for _ in range(2))
    scores = mx.array(rng.random((4, 3), dtype="float32"))

    def fused(gate, up, scores):
        return mx.sin(ops.expert_sum(ops.swiglu(gate, up), scores)).sum()

    def plain(gate, up, scores):
        return mx.sin((gate * mx.sigmoid(gate) * up * scores[..., None]).sum(axis=1)).sum()

    every = (0, 1, 2)
    assert_close(mx.grad(fused, every)(gate, up, scores), mx.grad(plain, every)(gate, up, scores))


@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 1, 2, 1, 3, 40)])
def test_norms(rng, shape):
    x = mx.array(rng.standard_normal(shape, dtype="float32"))
    weight, bias = (mx.array(rng.standard_normal(40, dtype="float32")) for _ in range(2))

    def rms(norm):
        return lambda x, w: mx.sin(norm(x, w, 0.1)).sum()

    def layer(norm):
        return lambda x, w, b: mx.sin(norm(x, w, b, 0.1)).sum()

    found = mx.grad(rms(ops.rms_norm), (0, 1))(x, weight)
    assert_close(found, mx.grad(rms(stock.rms_norm), (0, 1))(x, weight))
    found = mx.grad(layer(ops.layer_norm), (0, 1, 2))(x, weight, bias)
    assert_close(found, mx.grad(layer(stock.layer_norm), (0, 1, 2))(x, weight, bias))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("columns", [16, 21])
def test_rotate(rng, interleaved, columns):
    x = mx.array(rng.standard_normal((2, 3, 5, columns), dtype="float32"))
    angles = [mx.array(rng.standard_normal((1, 1, 5, 8), dtype="float32")) for _ in range(2)]

    def turned(rotate):
        return lambda x, c, s: mx.sin(rotate(x, c, s, interleaved)).sum()

    every = (0, 1, 2)
    found = mx.grad(turned(ops.rotate), every)(x, *angles)
    assert_close(found, mx.grad(turned(stock.rotate), every)(x, *angles))


def test_gradients_have_the_dtype_of_what_they_are_of(rng):
    x = mx.array(rng.standard_normal((1, 2, 3, 8), dtype="float32")).astype(mx.bfloat16)
    angles, weight = mx.ones((1, 1, 3, 4)), mx.ones(8)

    def loss(x, w):
        return ops.rotate(ops.layer_norm(ops.rms_norm(x, w, 0.1), w, w, 0.1), angles, angles).sum()

    found = mx.grad(loss, (0, 1))(x, weight)
    assert [g.dtype for g in found] == [mx.bfloat16, mx.float32]


def test_packed_rows_are_refused(rng):
    q = mx.array(rng.standard_normal((1, 2, 2, 40), dtype="float32"))
    rows = mx.zeros((1, 2, 32 + 4 + 16), mx.int8)
    with pytest.raises(ValueError, match=r"\[sparse_mla_decode\] packed rows .* kv_format"):
        mx.grad(lambda q: ops.sparse_mla_decode(q, rows, rank=32, scale=1.0).sum())(q)


def plain_ops(monkeypatch) -> None:
    """Put MLX's own differentiable ops where the model calls ours."""

    def router(x, w, bias, top_k, norm_topk_prob, routed_scaling_factor, **groups):
        scores = mx.sigmoid(x @ w.T)
        chosen = mx.argsort(-mx.stop_gradient(scores + bias), axis=-1)[:, :top_k]
        scores = mx.take_along_axis(scores, chosen, axis=-1)
        if norm_topk_prob:
            scores = scores / scores.sum(axis=-1, keepdims=True)
        return chosen, scores * routed_scaling_factor

    def experts(x, gate, up, down, slots, scores):
        return experts_by_hand(x, gate.planes[0], up.planes[0], down.planes[0], slots, scores)

    def attention(q, latents, ropes, selected, rank, scale, start):
        total = latents.shape[1]
        columns, queries = mx.arange(total), mx.arange(q.shape[1])[:, None]
        seen = columns <= queries
        if selected is not None:
            seen = seen & (selected[..., None] == columns).any(axis=-2)
        rows = mx.concatenate([latents, ropes], axis=-1)
        scores = mx.einsum("blhw,btw->blht", q, rows) * scale
        scores = mx.where(seen.reshape(-1, q.shape[1], 1, total), scores, -1e30)
        return mx.einsum("blht,btr->blhr", mx.softmax(scores, axis=-1), latents)

    monkeypatch.setattr(ops, "quantized_matvec", lambda x, w: x @ w.planes[0].swapaxes(-1, -2))
    monkeypatch.setattr(ops, "moe_decode", experts)
    monkeypatch.setattr(ops, "sparse_mla_decode", attention)
    monkeypatch.setattr("glm_fused.models.moe.ops.router_topk", router)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_of_a_model(model_type, compiled, monkeypatch):
    """More keys than index_topk make attention sparse; mlx-lm's trainer compiles its step."""
    args = args_from_config(CONFIG | TYPES[model_type] | {"model_type": model_type})
    tokens = mx.array([PROMPT, PROMPT[::-1]])

    def gradients():
        mx.random.seed(3)
        model = Model(args)

        def loss():
            logits = model(tokens[:, :-1])
            return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

        step = nn.value_and_grad(model, loss)
        if compiled:
            step = mx.compile(step, inputs=model.state)
        value, grads = step()
        return {"loss": value, **dict(tree_flatten(grads))}

    found = gradients()
    plain_ops(monkeypatch)
    compiled = False
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = mx.abs(value).max().item()
        assert mx.abs(found[name] - value).max().item() <= 1e-3 * scale + 1e-9, name
    constant = {n.rsplit(".", 2)[-2] for n, v in expected.items() if not mx.abs(v).max().item()}
    assert constant <= {"wq_b", "wk", "k_norm", "weights_proj", "gate"}  # these only choose
