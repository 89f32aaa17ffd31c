"""Every layout and format loads to the values that the stored numbers stand for."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    hf_tensors,
    make_tensors,
    tiny_config,
    write_checkpoint,
    write_safetensors,
)
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from glm_fused.checkpoint.declaration import quantization_from_config
from glm_fused.checkpoint.quantization import parse_format
from glm_fused.formats.weights import FORMATS, quantized_format
from glm_fused.loader import load, load_model
from glm_fused.models.config import args_from_config
from glm_fused.models.sanitize import dequantize_fp8, sanitize, stack

pytestmark = pytest.mark.usefixtures("several_threads")

MODES = [
    *({"group_size": 64, "bits": bits, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)),
    *({"group_size": group, "bits": 4, "mode": "affine"} for group in (32, 128)),
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]
AFFINE = MODES[2]
TOKENS = mx.array([[5, 17, 200, 3, 99, 41, 8, 8, 120, 63, 7, 11, 30, 31, 32, 77, 90, 91, 1, 2]])


def name_of(quantization):
    return quantized_format(**quantization).name


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def logits(path):
    model, _ = load_model(path)
    return model(TOKENS)


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item()


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not same_bits(a[name], b[name])]
    assert not different


def loaded(directory, *args, **kwargs):
    return load_model(write_checkpoint(directory, *args, **kwargs))[0]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    return parameters(loaded(tmp_path_factory.mktemp("mlx"), layout="mlx"))


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "hf"},
        {"layout": "hf-fused"},
        {"layout": "hf", "shards": 4},
        {"layout": "hf", "mtp": True},
        {"layout": "mlx", "mtp": True, "shards": 2},
        {"layout": "hf", "shared_indexers": True},
    ],
    ids=str,
)
def test_layouts_load_to_the_same_parameters(tmp_path, stacked, options):
    assert_same(parameters(loaded(tmp_path, **options)), stacked)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layouts_give_the_same_logits(tmp_path, dtype):
    hf = logits(write_checkpoint(tmp_path / "hf", layout="hf", dtype=dtype))
    ours = logits(write_checkpoint(tmp_path / "mlx", layout="mlx", dtype=dtype))
    assert same_bits(hf, ours)
    assert hf.dtype == getattr(mx, dtype)


def dense_values(tensors, quantization):
    """The float32 values that quantized tensors stand for."""
    quantization = quantization_from_config({"quantization": quantization})
    dense = {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases"):
            continue
        if f"{path}.scales" in tensors:
            scales, biases = tensors[f"{path}.scales"], tensors.get(f"{path}.biases")
            fmt = quantization.declared(path)[0].parameters
            array = mx.dequantize(array, scales, biases, **fmt)
        dense[name] = array.astype(mx.float32)
    return dense


def requantize_embed_q(tensors, config, quantization):
    """Do as loading does to a quantized kv_b_proj: quantize its transposed part again."""
    nope, heads = config["qk_nope_head_dim"], config["num_attention_heads"]
    declared = quantization_from_config({"quantization": quantization}).declared
    for name in [name for name in tensors if name.endswith("kv_b_proj.weight")]:
        fmt = declared(name.removesuffix(".weight"))[0]
        if nope % fmt.group_size:
            continue
        w = tensors[name].reshape(heads, nope + config["v_head_dim"], -1)
        source = w[:, :nope].swapaxes(-1, -2)
        if fmt.mode != "affine":  # mx.dequantize gives bfloat16
            source = source.astype(mx.bfloat16)
        packed = mx.quantize(mx.contiguous(source), **fmt.parameters)
        again = mx.dequantize(*packed, **fmt.parameters).astype(mx.float32)
        w = mx.concatenate([again.swapaxes(-1, -2), w[:, nope:]], axis=1)
        tensors[name] = w.reshape(tensors[name].shape)
    return tensors


@pytest.mark.parametrize("layout", ["mlx", "hf"])
@pytest.mark.parametrize("quantization", MODES, ids=name_of)
def test_quantized_checkpoint_equals_its_dense_values(tmp_path, layout, quantization):
    """Every matrix, in every mode, is taken for what mx.dequantize says it holds."""
    config = tiny_config()
    path = write_checkpoint(
        tmp_path / "q", layout=layout, quantization=quantization, dtype="float32"
    )
    quantized, _ = load_model(path)
    dense = dense_values(make_tensors(config, layout, quantization, "float32"), quantization)
    if layout == "hf":
        dense = requantize_embed_q(dense, config, quantization)
    expected = sanitize(dense, args_from_config(config), {})
    for name, module in quantized.named_modules():
        if "weight" not in module:
            continue
        found = module.weight
        if "scales" in module:
            fmt = module.format
            found = mx.dequantize(found, module.scales, module.get("biases"), **fmt.parameters)
            assert fmt is quantized_format(**quantization)
        np.testing.assert_array_equal(
            np.array(found.astype(mx.float32)), np.array(expected[f"{name}.weight"]), name
        )


OVERRIDES = {
    "model.layers.1.self_attn.kv_b_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
    "model.layers.2.self_attn.kv_b_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "model.layers.3.self_attn.kv_b_proj": False,
    "model.layers.1.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 6},
    "model.layers.2.mlp.switch_mlp.gate_proj": {"group_size": 32, "bits": 3},
    "model.layers.0.self_attn.o_proj": False,
    "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "lm_head": {"group_size": 64, "bits": 8},
}


def module_format(module):
    return module.format if "scales" in module else None


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_overrides_reach_their_modules(tmp_path, layout):
    model = loaded(tmp_path, layout=layout, quantization=AFFINE | OVERRIDES)
    found = {path: module_format(module) for path, module in model.named_modules()}
    for path, entry in OVERRIDES.items():
        expected = parse_format(path, entry) if entry else None
        if path.endswith("kv_b_proj"):
            prefix = path.removesuffix("kv_b_proj")
            assert found[f"{prefix}embed_q"] == found[f"{prefix}unembed_out"] == expected
        else:
            assert found[path] == expected
    assert found["model.layers.4.self_attn.embed_q"] == parse_format("", AFFINE)
    assert np.isfinite(np.array(model(TOKENS).astype(mx.float32))).all()


def test_overrides_of_single_experts_reach_the_stack(tmp_path):
    entry = {"group_size": 32, "bits": 8, "mode": "affine"}
    overrides = {f"model.layers.2.mlp.experts.{e}.up_proj": entry for e in range(8)}
    path = write_checkpoint(tmp_path, layout="mlx", quantization=AFFINE | overrides)
    model, _ = load_model(path)
    assert module_format(model.layers[2].mlp.switch_mlp.up_proj) is FORMATS["affine8-g32"]


def test_group_beyond_the_head_keeps_embed_q_dense(tmp_path):
    quantization = {"group_size": 128, "bits": 4, "mode": "affine"}
    model = loaded(tmp_path, layout="hf", quantization=quantization)
    attention = model.layers[1].self_attn
    assert module_format(attention.embed_q) is None
    assert module_format(attention.unembed_out) is FORMATS["affine4-g128"]


def test_fp8_is_exact(tmp_path):
    """Each value, in ragged blocks too, is e4m3 times its block's scale, rounded once to bf16."""
    config = tiny_config(hidden_size=144, moe_intermediate_size=80, intermediate_size=264)
    path = write_checkpoint(tmp_path, config, layout="fp8")
    found = parameters(load_model(path)[0])
    tensors = make_tensors(config, "fp8")
    for name, stored in tensors.items():
        if not isinstance(stored, tuple):
            continue
        _, (m, n), codes = stored
        codes = mx.array(np.frombuffer(codes, np.uint8).reshape(m, n))
        values = np.array(mx.from_fp8(codes, mx.float32))
        scale = np.array(tensors[f"{name}_scale_inv"])
        expected = mx.array(values * scale.repeat(128, 0)[:m].repeat(128, 1)[:, :n])
        if name in found:
            assert same_bits(found[name], expected.astype(mx.bfloat16)), name
        elif ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            e, _, leaf = rest.partition(".")
            assert same_bits(
                found[f"{prefix}.switch_mlp.{leaf}"][int(e)], expected.astype(mx.bfloat16)
            )


LISTS = {
    "the release's": ["lm_head", "model.embed_tokens", "model.layers.1.self_attn.indexers_proj"],
    "all": ["re:.*", "model", "model.layers.1.self_attn.q_a_proj", "model.layers.1.mlp.experts"],
    "nothing": [],
    "no list": None,
}


@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
def test_fp8_is_what_its_tensors_say(tmp_path, listed):
    """The release names modules that do not exist, and leaves out others that are bfloat16."""
    path = write_checkpoint(tmp_path, layout="fp8")
    expected = parameters(load_model(path)[0])
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = listed
    (path / "config.json").write_text(json.dumps(config))
    model, _ = load_model(path)
    assert_same(parameters(model), expected)
    stored = make_tensors(tiny_config(), "fp8")
    indexer = model.layers[1].self_attn.indexer
    proj = stored["model.layers.1.self_attn.indexer.weights_proj.weight"]
    assert same_bits(indexer.weights_proj.weight, proj)
    assert isinstance(stored["model.layers.1.self_attn.indexer.wq_b.weight"], tuple)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 300), (256, 100)])
def test_fp8_covers_every_code(shape):
    codes = mx.arange(math.prod(shape)).astype(mx.uint8).reshape(shape)
    blocks = [-(-n // 128) for n in shape]
    scales = mx.arange(1, math.prod(blocks) + 1).reshape(blocks).astype(mx.float32)
    found = dequantize_fp8("w", codes, scales)
    full = mx.repeat(mx.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    expected = (mx.from_fp8(codes, mx.float32) * full).astype(mx.bfloat16)
    assert same_bits(found, expected)


def test_stack_is_mx_stack():
    parts = [mx.random.normal((3, 5)).astype(mx.bfloat16) for _ in range(4)]
    assert same_bits(stack(parts), mx.stack(parts))


@pytest.mark.parametrize("options", [{"layout": "hf"}, {"quantization": AFFINE}], ids=str)
def test_stock_mlx_lm_loads_the_same_parameters(tmp_path, options):
    from mlx_lm.utils import load_model as stock_load_model

    from glm_fused.models.config import ModelArgs
    from glm_fused.models.decoder import Model

    path = write_checkpoint(tmp_path, mtp=True, shared_indexers=True, **options)
    stock, _ = stock_load_model(path, get_model_classes=lambda config: (Model, ModelArgs))
    assert_same(parameters(stock), parameters(load_model(path)[0]))


def test_sanitize_names_what_does_not_fit():
    config = tiny_config()
    args = args_from_config(config)

    def tensors():
        return hf_tensors(config, mx.bfloat16)

    broken = tensors()
    del broken["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight is missing"):
        sanitize(broken, args, {})
    broken = tensors() | {"model.layers.1.mlp.experts.3.up_proj.weight": mx.zeros((1, 128))}
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight is .* like expert 0"):
        sanitize(broken, args, {})
    broken = tensors() | {"model.layers.1.self_attn.kv_b_proj.weight": mx.zeros((1, 128))}
    with pytest.raises(ValueError, match=r"kv_b_proj\.weight is .* expected 512 rows"):
        sanitize(broken, args, {})
    broken = tensors() | {"lm_tail.weight_scale_inv": mx.zeros((1, 1))}
    with pytest.raises(ValueError, match=r"lm_tail\.weight, which is missing"):
        sanitize(broken, args, {})


def test_eos_comes_from_the_generation_config(checkpoint):
    path = checkpoint()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    _, config = load_model(path)
    assert config["eos_token_id"] == [9]


def test_load_brings_the_tokenizer(checkpoint):
    path = checkpoint()
    vocabulary = {"<|endoftext|>": 0, "hello": 1, "world": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    model, found = load(path)
    assert found.encode("hello world") == [1, 2]
    assert {250, 251} <= set(found.eos_token_ids)  # config.json has them
    assert model(mx.array([[1, 2]])).shape == (1, 2, 256)


def test_other_files_in_the_folder_are_not_read(checkpoint):
    path = checkpoint()
    write_safetensors(path / "adapters.safetensors", {"model.norm.weight": mx.zeros((3,))})
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    load_model(path)
