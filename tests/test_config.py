"""Config parsing: release spellings, layer schedules, RoPE, and one clear error for the rest."""

import json
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from glm_fused.models.config import DeepseekV32Args, ModelArgs, args_from_config
from glm_fused.models.rope import Rope, RopeParameters

GLM52 = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 8,
    "index_head_dim": 12,
    "index_topk": 24,
    "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
    "index_topk_pattern": None,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "moe_router_dtype": "float32",
    "head_dim": 12,
}
DEFAULT_64 = [
    1.0,
    0.6085250377655029,
    0.3703027069568634,
    0.22533845901489258,
    0.13712409138679504,
    0.08344343304634094,
    0.05077742040157318,
    0.030899332836270332,
]
YARN_16 = [
    1.0,
    0.17782793939113617,
    0.026516716927289963,
    0.0023498416412621737,
    0.0002702702768146992,
    4.8061607230920345e-05,
    8.546695426048245e-06,
    1.5198414757833234e-06,
]
YARN_SCALES = (0.9329107838537295, 0.09880591007262209)
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def parse(**changes: Any) -> ModelArgs:
    return args_from_config(GLM52 | changes)


def without(*keys: str) -> dict[str, Any]:
    return {k: v for k, v in GLM52.items() if k not in keys}


def test_release_defaults():
    glm, deepseek = ModelArgs.from_dict({}), DeepseekV32Args.from_dict({})
    assert (glm.hidden_size, glm.num_hidden_layers, glm.rms_norm_eps) == (6144, 78, 1e-5)
    assert glm.indexer_types == ["full"] * 78
    assert glm.mlp_layer_types == ["dense"] * 3 + ["sparse"] * 75
    assert (deepseek.hidden_size, deepseek.n_group, deepseek.topk_group) == (7168, 8, 4)
    assert glm.indexer_rope_interleave and not deepseek.indexer_rope_interleave


def test_release_schedule_of_5_2():
    config = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    types = ModelArgs.from_dict(config).indexer_types
    full = [i for i, kind in enumerate(types) if kind == "full"]
    assert full == [0, 1, *range(2, 78, 4)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "FFSSFS"),
        ({"indexer_types": None, "index_topk_pattern": "FSFSFS"}, "FSFSFS"),
        ({"indexer_types": None, "index_topk_pattern": ["full", *["shared"] * 5]}, "FSSSSS"),
        ({"indexer_types": None}, "FFFSSS"),
        ({"indexer_types": None, "index_skip_topk_offset": None}, "FFSSSF"),
        ({"indexer_types": None, "index_topk_freq": None}, "FFFFFF"),
        ({"indexer_types": None, "index_topk_freq": 0}, "FFFFFF"),
        ({"model_type": "deepseek_v32"}, "FFFFFF"),
    ],
)
def test_indexer_schedule_order_of_authority(changes, expected):
    args = parse(**changes)
    assert "".join(kind[0].upper() for kind in args.indexer_types) == expected
    assert [layer.is_full for layer in args.layers] == [c == "F" for c in expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "DDDSSS"),
        ({"mlp_layer_types": None, "first_k_dense_replace": 1}, "DSSSSS"),
        ({"mlp_layer_types": None, "first_k_dense_replace": 0, "moe_layer_freq": 2}, "SDSDSD"),
        ({"mlp_layer_types": None, "first_k_dense_replace": 99}, "DDDDDD"),
        ({"mlp_layer_types": None, "n_routed_experts": None}, "DDDDDD"),
    ],
)
def test_mlp_schedule(changes, expected):
    assert "".join(kind[0].upper() for kind in parse(**changes).mlp_layer_types) == expected


@pytest.mark.parametrize("count", [160, 96])
def test_pruned_expert_counts(count):
    assert parse(n_routed_experts=count).n_routed_experts == count
    args = args_from_config(without("n_routed_experts") | {"num_experts": count})
    assert args.n_routed_experts == count


def test_keys_that_transformers_drops_have_defaults():
    args = args_from_config(without("scoring_func", "topk_method", "moe_layer_freq"))
    assert (args.scoring_func, args.topk_method, args.moe_layer_freq) == ("sigmoid", "noaux_tc", 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RopeParameters(theta=8e6)),
        ({"rope_parameters": None, "rope_theta": 1e6}, RopeParameters(theta=1e6)),
        ({"rope_parameters": None, "rope_scaling": None}, RopeParameters(theta=1e4)),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5}, RopeParameters(theta=1e6)),
        ({"rope_parameters": {"type": "default"}, "rope_theta": 1e6}, RopeParameters(theta=1e6)),
    ],
)
def test_rope_spellings(changes, expected):
    assert parse(**changes).rope == expected


def test_yarn_is_the_same_in_either_spelling():
    old = parse(rope_parameters=None, rope_theta=10000, rope_scaling=YARN)
    modern = {"rope_type": "yarn", "rope_theta": 10000} | {k: YARN[k] for k in YARN if k != "type"}
    assert old.rope == parse(rope_parameters=modern).rope
    assert old.rope.attention_scaling == pytest.approx(0.1 * np.log(40) + 1)


def test_inverse_frequencies_are_torchs():
    """The expected bits are from transformers 5.23 with torch 2.13."""
    default = RopeParameters(theta=8e6).inv_freq(64)
    assert default.dtype == np.float32
    assert default[:8].tolist() == DEFAULT_64
    yarn = RopeParameters(
        1e6, "yarn", 3.7, 2048, beta_fast=20.0, mscale=0.7, mscale_all_dim=1.3, truncate=False
    )
    assert yarn.inv_freq(16).tolist() == YARN_16
    assert (yarn.attention_scaling, yarn.softmax_scale(192)) == YARN_SCALES


def test_angles_hold_at_a_million_tokens():
    rope = Rope(RopeParameters(theta=8e6), 64)
    positions = np.array([[0, 202751, 1048575]], np.int32)
    cos, sin = rope.angles(mx.array(positions))
    freqs = np.array(rope.inv_freq)
    exact = (positions.astype(np.float32)[..., None] * freqs).astype(np.float64)
    np.testing.assert_allclose(np.array(cos)[:, 0], np.cos(exact), atol=2e-7)
    np.testing.assert_allclose(np.array(sin)[:, 0], np.sin(exact), atol=2e-7)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "llama", "'llama'"),
        ("model_type", ["glm_moe_dsa"], "model_type"),
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", "64", "'64'"),
        ("hidden_size", 64.0, "64.0"),
        ("hidden_size", True, "True"),
        ("hidden_size", None, "None"),
        ("hidden_size", 2**31, str(2**31)),
        ("hidden_size", 10**400, "hidden_size"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_attention_heads", 2**30, "num_attention_heads * head size"),
        ("index_n_heads", 2**29, "index_n_heads * index_head_dim"),
        ("qk_rope_head_dim", 7, "qk_rope_head_dim must be even"),
        ("index_head_dim", 6, "at least qk_rope_head_dim"),
        ("num_experts_per_tok", 9, "num_experts_per_tok"),
        ("n_group", 3, "a divisor of n_routed_experts"),
        ("n_group", 8, "n_group"),
        ("topk_group", 2, "topk_group"),
        ("n_routed_experts", None, "n_routed_experts"),
        ("n_shared_experts", 2**30, "n_shared_experts"),
        ("n_shared_experts", -1, "n_shared_experts"),
        ("scoring_func", "softmax", "'softmax'"),
        ("topk_method", "greedy", "'greedy'"),
        ("hidden_act", "gelu", "'gelu'"),
        ("norm_topk_prob", 1, "norm_topk_prob"),
        ("attention_bias", "false", "attention_bias"),
        ("rms_norm_eps", 0, "rms_norm_eps"),
        ("rms_norm_eps", float("nan"), "nan"),
        ("routed_scaling_factor", float("inf"), "inf"),
        ("indexer_types", ["full"] * 5, "num_hidden_layers"),
        ("indexer_types", ["shared", *["full"] * 5], "first layer"),
        ("indexer_types", ["full"] * 5 + ["none"], "indexer_types[5]"),
        ("indexer_types", "FFFFFF", "indexer_types"),
        ("mlp_layer_types", [["dense"]] * 6, "mlp_layer_types[0]"),
        ("rope_parameters", [], "rope_parameters"),
        ("rope_parameters", {"rope_type": "linear"}, "'linear'"),
        ("rope_parameters", {"rope_theta": 0}, "rope_parameters.rope_theta"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 0.5}, "rope_parameters.factor"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 10**400}, "rope_parameters.factor"),
    ],
)
def test_impossible_values_are_named(key, value, named):
    with pytest.raises(ValueError) as error:
        parse(**{key: value})
    assert named in str(error.value)
    assert len(str(error.value)) < 300


def test_integers_too_long_to_print():
    for value in (10**5000, [10**5000], {"rope_type": 10**5000}):
        with pytest.raises(
            ValueError, match=r"rope_parameters.*found (an integer|a list|a dict|\[|\{|<int)"
        ):
            parse(rope_parameters={"rope_type": value})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"index_topk_pattern": "SFFFFF"}, "index_topk_pattern"),
        ({"index_topk_pattern": "FFXFFF"}, "index_topk_pattern[2]"),
        ({"index_topk_pattern": "FFF"}, "index_topk_pattern"),
        ({"index_topk_pattern": {}}, "index_topk_pattern"),
        ({"index_skip_topk_offset": 0}, "index_skip_topk_offset"),
        ({"index_topk_freq": -1}, "index_topk_freq"),
        ({"index_topk_freq": 2.5}, "index_topk_freq"),
    ],
)
def test_impossible_schedules_are_named(changes, key):
    with pytest.raises(ValueError) as error:
        parse(indexer_types=None, **changes)
    assert key in str(error.value)


@pytest.mark.parametrize("config", [None, [], "glm", 3, {}, {"model_type": None}])
def test_not_a_config(config):
    with pytest.raises(ValueError, match=r"config\.json|model_type"):
        args_from_config(config)


def test_a_class_refuses_the_other_model_type():
    with pytest.raises(ValueError, match="model_type"):
        DeepseekV32Args.from_dict(GLM52)


def _garbage(rng: random.Random, depth: int = 0) -> Any:
    simple: list[Any] = [
        None, True, False, 0, 1, -1, 2**31, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"),
        "", "full", "F" * 6, "yarn", "\ud800", [], {},
    ]  # fmt: skip
    if depth < 3 and rng.random() < 0.3:
        inner = [_garbage(rng, depth + 1) for _ in range(rng.randrange(7))]
        keys = ("rope_type", "type", "factor", "rope_theta", "beta_fast", "mscale_all_dim", "0")
        return inner if rng.random() < 0.5 else dict(zip(keys, inner, strict=False))
    return rng.choice(simple)


def test_mutated_configs_parse_or_raise_value_error():
    rng = random.Random(5)
    parsed = 0
    for _ in range(4000):
        config = json.loads(json.dumps(GLM52))
        if rng.random() < 0.3:
            config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4}
            key = rng.choice(["factor", "beta_fast", "beta_slow", "mscale", "truncate", "type"])
            config["rope_parameters"][key] = _garbage(rng)
        for key in rng.sample(sorted(config), rng.randrange(1, 4)):
            config[key] = _garbage(rng)
        try:
            args = args_from_config(config)
        except ValueError as error:
            assert str(error).startswith("[config] ")
        else:
            assert np.isfinite(args.rope.inv_freq(args.qk_rope_head_dim)).all()
            parsed += 1
    assert 0 < parsed < 4000
