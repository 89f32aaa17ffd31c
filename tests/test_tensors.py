"""The tensor table and the layers' specs agree with models and with stored checkpoints."""

import mlx.core as mx
import pytest
from conftest import make_tensors, tiny_config, tiny_config_51
from mlx.utils import tree_flatten

from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model
from glm_fused.models.layer_spec import LayerSpec
from glm_fused.models.tensor_names import is_expert, layer_of, release_name, unused
from glm_fused.models.tensors import PROJECTIONS, expert_modules, modules

DEEPSEEK = {"model_type": "deepseek_v32", "n_group": 2, "topk_group": 1, "hidden_act": "silu"}
CONFIGS = {
    "5.2": tiny_config(),
    "5.1": tiny_config_51(),
    "DeepSeek-V3.2": tiny_config_51(**DEEPSEEK),
    "dense": tiny_config(n_routed_experts=None),
    "sparse": tiny_config(first_k_dense_replace=0),
    "tied": tiny_config(tie_word_embeddings=True),
    "biased": tiny_config(attention_bias=True),
    "no shared experts": tiny_config(n_shared_experts=0),
    "two shared experts": tiny_config(n_shared_experts=2),
    "experts by layer": tiny_config(num_routed_experts_per_layer=[0, 8, 4, 6, 3, 5]),
}


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_describes_the_model(config, mtp):
    args = args_from_config(config)
    args = args.with_mtp() if mtp else args
    described = {}
    for module in modules(args):
        described[f"{module.path}.weight"] = module.shape
        if module.bias:
            described[f"{module.path}.{module.bias[0]}"] = (module.bias[1],)
    parameters = tree_flatten(Model(args).parameters())
    assert {name: array.shape for name, array in parameters} == described


@pytest.mark.parametrize("layout", ["mlx", "hf", "hf-fused"])
def test_forms_are_those_of_stored_checkpoints(layout):
    """The forms found name every tensor that a checkpoint has, MTP's too, and give its shape."""
    config = tiny_config()
    args = args_from_config(config)
    tensors = make_tensors(config, layout, mtp=True)
    described = {}
    for module in modules(args.with_mtp()):
        form = module.form_in(tensors)
        for path in form.paths(module.experts):
            described[path + form.suffix] = form.shape
        if module.bias:
            described[f"{module.path}.{module.bias[0]}"] = (module.bias[1],)
    assert {name: array.shape for name, array in tensors.items()} == described


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shards_never_cut_a_dot_product(config):
    for module in modules(args_from_config(config)):
        assert module.shard is None or 0 <= module.shard < len(module.shape) - 1, module


def test_parts_of_a_shared_tensor_cover_it():
    args = args_from_config(tiny_config())
    for spec in args.layers[1:]:
        gate, up, down = expert_modules(args, spec)
        single, fused = gate.other_forms
        assert single.shape == gate.shape[1:]
        assert fused.path == up.other_forms[1].path
        assert (fused.first_row, up.other_forms[1].first_row) == (0, gate.shape[1])
        assert fused.shape[1] == gate.shape[1] + up.shape[1]
        assert down.other_forms[1].shape == down.shape
        assert tuple(m.path.rpartition(".")[2] for m in (gate, up, down)) == PROJECTIONS
    table = {module.path: module for module in modules(args)}
    embed_q = table["model.layers.0.self_attn.embed_q"]
    unembed_out = table["model.layers.0.self_attn.unembed_out"]
    (first,), (second,) = embed_q.other_forms, unembed_out.other_forms
    assert (first.path, first.shape) == (second.path, second.shape)
    assert second.first_row == embed_q.shape[2]
    assert first.shape[0] == args.num_attention_heads * (second.first_row + unembed_out.shape[1])


def test_what_stays_unquantized():
    sensitive = {m.path for m in modules(args_from_config(tiny_config())) if m.sensitive}
    layer = "model.layers.1"
    assert {f"{layer}.mlp.gate", f"{layer}.self_attn.indexer.wk"} <= sensitive
    assert all(path.endswith((".gate", ".wq_b", ".wk", ".weights_proj")) for path in sensitive)


def test_layers_of_a_tiny_5_2():
    args = args_from_config(tiny_config(num_routed_experts_per_layer=[0, 8, 4, 6, 3, 5]))
    both, latent = ("latent", "index_key"), ("latent",)
    assert args.layers == (
        LayerSpec(0, "full", both, "dense", 0, "decoder"),
        LayerSpec(1, "full", both, "sparse", 8, "decoder"),
        LayerSpec(2, "shared", latent, "sparse", 4, "decoder"),
        LayerSpec(3, "full", both, "sparse", 6, "decoder"),
        LayerSpec(4, "shared", latent, "sparse", 3, "decoder"),
    )
    assert args.mtp_layers == (LayerSpec(5, "full", both, "sparse", 5, "mtp"),)
    assert [len(entry.caches) for entry in Model(args).make_cache()] == [2, 2, 1, 2, 1]
    with pytest.raises(AttributeError):
        args.layers[0].experts = 3


NAMES = {
    "mtp.0.block.self_attn.o_proj.weight": "model.layers.5.self_attn.o_proj.weight",
    "model.mtp.1.block.mlp.gate.weight": "model.layers.6.mlp.gate.weight",
    "mtp.0.eh_proj.weight": "model.layers.5.eh_proj.weight",
    "mtp.0.norm.weight": "model.layers.5.shared_head.norm.weight",
    "model.layers.5.enorm.weight": "model.layers.5.enorm.weight",
    "model.norm.weight": "model.norm.weight",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_names_of_mtp_layers(name, expected):
    args = args_from_config(tiny_config())
    assert release_name(name, len(args.layers)) == expected
    assert (unused(expected, args) == "MTP layer") == (layer_of(expected) is not None)


def test_reasons_for_unused_tensors():
    args = args_from_config(tiny_config(tie_word_embeddings=True))
    reasons = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "rotary tables",
        "lm_head.weight": "tied head",
        "model.layers.2.self_attn.indexer.wk.weight": "indexer of a shared layer",
        "model.layers.3.self_attn.indexer.wk.weight": None,
        "model.embed_tokens.weight": None,
    }
    assert {name: unused(name, args) for name in reasons} == reasons


def test_experts_are_told_by_their_names():
    for layout in ("mlx", "hf", "hf-fused"):
        tensors = make_tensors(tiny_config(), layout)
        experts = sum(array.size for name, array in tensors.items() if is_expert(name))
        assert experts == 4 * 8 * 3 * 128 * 128
    assert isinstance(tensors["lm_head.weight"], mx.array)
