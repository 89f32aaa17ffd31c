"""The model agrees with transformers' golden vectors, however its tokens are fed."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    BatchKVCache,
    CacheList,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import glm_fused
from glm_fused import ops
from glm_fused.formats.weights import quantized_format
from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model
from glm_fused.ops import chunks, stock

VECTORS = Path(__file__).parent / "vectors"
CASES = ["glm51", "glm52", "glm_pattern", "deepseek_v32", "odd_sizes", "fp8"]
TOLERANCE = 2e-4  # as a part of the logits' standard deviation

Keys = list[list[set[int]]]  # [full layer][query]: the selected keys that the query may see


@cache
def golden(case: str) -> tuple[Model, dict[str, mx.array]]:
    model, _ = glm_fused.load_model(VECTORS / case)
    model.set_dtype(mx.float32)  # fp8 loads as bfloat16; the oracle computed in float32
    return model, mx.load(str(VECTORS / case / "expected.safetensors"))


def feed(model: Model, tokens: mx.array, step: int, kv: Any = None) -> tuple[np.ndarray, Keys]:
    """The logits and selections of one sequence that is fed ``step`` tokens at a time."""
    kv = model.make_cache() if kv is None else kv
    logits: list[np.ndarray] = []
    chosen: Keys = []
    for lo in range(0, tokens.shape[1], step):
        trace: list[mx.array] = []
        logits.append(np.array(model(tokens[:, lo : lo + step], kv, trace=trace)))
        chosen = chosen or [[] for _ in trace]
        for layer, rows in zip(chosen, trace, strict=True):
            layer += visible(rows)
    return np.concatenate(logits, axis=1), chosen


def visible(rows: mx.array) -> list[set[int]]:
    return [{k for k in row if k >= 0} for row in np.array(rows[0]).tolist()]


def expected_keys(model: Model, expected: dict[str, mx.array]) -> Keys:
    full = [layer.index for layer in model.args.layers if layer.is_full]
    assert {f"topk.{i}" for i in full} == {key for key in expected if key.startswith("topk.")}
    return [
        [{k for k in row if 0 <= k <= i} for i, row in enumerate(np.array(rows).tolist())]
        for rows in (expected[f"topk.{i}"] for i in full)
    ]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * expected.std()


@pytest.mark.parametrize("step", [208, 33, 1], ids=["whole", "chunks", "tokens"])
@pytest.mark.parametrize("case", CASES)
def test_golden_logits_and_selections(case, step):
    model, expected = golden(case)
    assert expected["tokens"].shape[1] >= 5 * model.args.index_topk
    logits, keys = feed(model, expected["tokens"], step)
    assert_close(logits, np.array(expected["logits"]))
    assert keys == expected_keys(model, expected)


def test_without_a_cache():
    model, expected = golden("glm52")
    assert_close(np.array(model(expected["tokens"])), np.array(expected["logits"]))


@pytest.mark.parametrize("budget", [10_000, 1 << 30], ids=["few queries", "one chunk"])
def test_stock_ops_agree(monkeypatch, budget):
    """They are what a GPU without Metal runs."""
    monkeypatch.setattr(chunks, "BUDGET_BYTES", budget)

    def indexer_topk(q, keys, weights, k, *, scale, weight_scale, start):
        return stock.indexer_topk(q, keys, weights * weight_scale, k, scale, start)

    def sparse_mla_decode(q, latents, ropes, selected, *, rank, scale, start):
        return stock.sparse_mla_decode(q, latents, ropes, selected, rank, scale, start)

    monkeypatch.setattr(ops, "indexer_topk", indexer_topk)
    monkeypatch.setattr(ops, "sparse_mla_decode", sparse_mla_decode)
    model, expected = golden("glm52")
    logits, keys = feed(model, expected["tokens"], 104)
    assert_close(logits, np.array(expected["logits"]))
    assert keys == expected_keys(model, expected)


def padded_cache(model: Model, padding: list[int]) -> list[CacheList]:
    return [
        CacheList(*(BatchKVCache(padding) for _ in layer.caches)) for layer in model.make_cache()
    ]


@pytest.mark.parametrize("step", [130, 50, 1])
def test_left_padded_batch(step):
    model, _ = golden("glm52")
    batch = mx.load(str(VECTORS / "glm52" / "expected_batch.safetensors"))
    tokens, lengths = batch["tokens"], batch["lengths"].tolist()
    kv = padded_cache(model, [tokens.shape[1] - n for n in lengths])
    for lo in range(0, tokens.shape[1], step):
        logits = model(tokens[:, lo : lo + step], kv)
        mx.eval(logits)
    assert_close(np.array(logits[:, -1]), np.array(batch["last_logits"]))


def test_padding_is_ignored():
    """The padding tokens do not change the rest of the row, whatever they are."""
    model, expected = golden("glm52")
    prompt = expected["tokens"][:, :60]
    outs = []
    for filler in (0, 93):
        row = mx.concatenate([mx.full((1, 30), filler, mx.int32), prompt], axis=1)
        logits = model(row, padded_cache(model, [30]))
        outs.append(np.array(logits[:, 30:]))
    assert np.array_equal(*outs)
    assert_close(outs[0], np.array(expected["logits"][:, :60]))


@pytest.mark.parametrize("step", [70, 1])
def test_batch_equals_singles(step):
    model, expected = golden("glm_pattern")
    rows = mx.stack([expected["tokens"][0, lo : lo + 70] for lo in (0, 40, 90)])
    batch, _ = feed(model, rows, step)
    singles = [feed(model, rows[i : i + 1], step)[0] for i in range(3)]
    assert_close(batch, np.concatenate(singles), 1e-5)


@pytest.mark.parametrize("kept", [10, 90])
def test_trimmed_cache_continues_like_a_fresh_one(kept):
    model, expected = golden("glm52")
    tokens = expected["tokens"]
    kv = model.make_cache()
    feed(model, tokens[:, :kept], kept, kv)
    feed(model, 92 - tokens[:, kept : kept + 60], 60, kv)
    assert trim_prompt_cache(kv, 60) == 60
    logits, keys = feed(model, tokens[:, kept:], 1, kv)
    assert_close(logits, np.array(expected["logits"][:, kept:]))
    assert keys == [layer[kept:] for layer in expected_keys(model, expected)]


@pytest.mark.parametrize("length", [10, 100])
def test_saved_cache_continues(tmp_path, length):
    model, expected = golden("glm52")
    tokens, kv = expected["tokens"], model.make_cache()
    feed(model, tokens[:, :length], length, kv)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), kv)
    kv = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    logits, _ = feed(model, tokens[:, length:], 54, kv)
    assert_close(logits, np.array(expected["logits"][:, length:]))


def test_shared_layers_own_no_indexer():
    model, _ = golden("glm52")
    names = [name for name, _ in tree_flatten(model.parameters())]
    kv = model.make_cache()
    model(mx.zeros((1, 3), mx.int32), kv)
    args = model.args
    for i, layer in enumerate(args.layers):
        indexer = [n for n in names if n.startswith(f"model.layers.{i}.self_attn.indexer.")]
        assert len(indexer) == (5 if layer.is_full else 0)
        tokens, widths = kv[i][0].keys.shape[2], args.kv_lora_rank + args.qk_rope_head_dim
        if layer.is_full:
            widths += args.index_head_dim
        assert kv[i].nbytes == tokens * widths * 4


def test_unscored_keys_do_not_pile_up(tmp_path):
    """Below index_topk nothing reads the indexer cache; its updates must be evaluated anyway."""
    model, _ = golden("glm52")
    kv, sizes = model.make_cache(), []
    for step in range(12):
        logits = model(mx.array([[step]]), kv)
        mx.export_to_dot(str(tmp_path / "graph.dot"), logits)
        sizes.append((tmp_path / "graph.dot").read_text().count("->"))
        mx.eval(logits)
    assert sizes[11] <= sizes[3]


def test_equal_scores_select_the_lowest_keys():
    model, expected = golden("glm51")
    topk, saved = model.args.index_topk, {}
    for i, layer in enumerate(model.layers):
        proj = layer.self_attn.indexer.weights_proj
        saved[i], proj.weight = proj.weight, mx.zeros_like(proj.weight)
    try:
        _, keys = feed(model, expected["tokens"][:, :100], 100)
    finally:
        for i, weight in saved.items():
            model.layers[i].self_attn.indexer.weights_proj.weight = weight
    assert keys == [[set(range(min(i + 1, topk))) for i in range(100)]] * len(model.layers)


@pytest.mark.parametrize(
    "changes",
    [{"n_shared_experts": 0}, {"n_shared_experts": None}, {"attention_bias": True},
     {"tie_word_embeddings": True}, {"n_routed_experts": None, "mlp_layer_types": None}],
)  # fmt: skip
def test_optional_parts(changes):
    model = tiny(**changes)
    names = {name for name, _ in tree_flatten(model.parameters())}
    has = {
        "n_shared_experts": any("shared_experts" in n for n in names),
        "attention_bias": any(n.endswith("o_proj.bias") for n in names),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "n_routed_experts": any("switch_mlp" in n for n in names),
    }
    wanted = {"n_shared_experts": 1, "n_routed_experts": 1} | changes
    wanted["n_shared_experts"] = wanted["n_shared_experts"] and wanted["n_routed_experts"]
    assert has == {key: bool(wanted.get(key)) for key in has}
    logits = model(mx.array([[1, 2, 3]]), model.make_cache())
    assert logits.shape == (1, 3, 96)
    assert np.isfinite(np.array(logits)).all()


def tiny(**changes: Any) -> Model:
    config = json.loads((VECTORS / "glm51" / "config.json").read_text())
    return Model(args_from_config(config | changes))


def test_attention_bias_is_added():
    model, tokens = tiny(attention_bias=True), mx.array([[1, 2, 3]])
    before = np.array(model(tokens))
    attention = model.layers[0].self_attn
    for proj in (attention.q_a_proj, attention.kv_a_proj_with_mqa, attention.o_proj):
        proj.bias = mx.ones_like(proj.bias)
        after = np.array(model(tokens))
        assert np.abs(after - before).max() > 1e-3
        before = after


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"),
    [("affine", 32, 4), ("affine", 32, 3), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)],
)
def test_quantized_layers(mode, group_size, bits):
    """nn.quantize reaches every linear layer, and packed weights act like their values."""
    mx.random.seed(0)
    packed, plain = tiny(), tiny()
    plain.update(packed.parameters())

    def wanted(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and not isinstance(module, nn.Embedding)

    nn.quantize(packed, group_size, bits, mode=mode, class_predicate=wanted)
    scales = {n for n, _ in tree_flatten(packed.parameters()) if n.endswith(".scales")}
    layer = "model.layers.3"
    assert {
        "lm_head.scales", f"{layer}.self_attn.embed_q.scales", f"{layer}.self_attn.o_proj.scales",
        f"{layer}.self_attn.indexer.wk.scales", f"{layer}.mlp.switch_mlp.up_proj.scales",
        f"{layer}.mlp.shared_experts.up_proj.scales",
    } <= scales  # fmt: skip
    for (_, quantized), (_, dense) in zip(
        packed.named_modules(), plain.named_modules(), strict=True
    ):
        if "scales" in quantized:
            w = quantized.as_weight()
            assert w.format is quantized.format is quantized_format(group_size, bits, mode)
            values = mx.dequantize(*w.planes, **w.format.parameters)
            dense.weight = values.astype(mx.float32)
    tokens = mx.array([[5, 6, 7, 8]])
    assert_close(np.array(packed(tokens)), np.array(plain(tokens)), 1e-4)


def test_bfloat16_stays_bfloat16():
    mx.random.seed(1)
    model = tiny()
    tokens = mx.random.randint(0, 93, (1, 100))
    exact = np.array(model(tokens))
    model.set_dtype(mx.bfloat16)
    kv = model.make_cache()
    logits = model(tokens, kv)
    assert logits.dtype == mx.bfloat16
    assert {c.keys.dtype for layer in kv for c in layer.caches} == {mx.bfloat16}
    error = np.array(logits.astype(mx.float32)) - exact
    assert 0 < np.abs(error).mean() < 0.1 * exact.std()


def test_cast_predicate_keeps_the_correction_bias():
    model = tiny()
    kept = [n for n, _ in tree_flatten(model.parameters()) if not model.cast_predicate(n)]
    assert kept == ["model.layers.3.mlp.gate.e_score_correction_bias"]


@pytest.mark.parametrize(
    "tokens",
    [mx.zeros((1, 3)), mx.zeros((3,), mx.int32), mx.zeros((1, 0), mx.int32), [[1, 2]]],
    ids=["float", "rank 1", "empty", "list"],
)
def test_bad_tokens(tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        golden("glm51")[0](tokens)


def test_bad_caches():
    model, _ = golden("glm52")
    tokens, kv = mx.zeros((1, 2), mx.int32), model.make_cache()
    with pytest.raises(ValueError, match=r"one entry per layer \(8\), got 3"):
        model(tokens, kv[:3])
    with pytest.raises(ValueError, match="layer 0 is 'full' and needs a CacheList of 2"):
        model(tokens, kv[::-1])
