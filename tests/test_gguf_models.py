"""Whole models in GGUF's block formats: the values are the gguf package's, the bits our own."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config
from gguf_files import Q, gguf_tensors, write_gguf
from mlx.utils import tree_flatten

from glm_fused import Engine, load_model, reference_path
from glm_fused.checkpoint.description import describe
from glm_fused.checkpoint.gguf_formats import format_of
from glm_fused.checkpoint.gguf_types import GGML_TYPES
from glm_fused.formats.weights import GGUF
from glm_fused.selftest.synthetic import Bits
from glm_fused.streaming.flashmoe_export import export
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack

CONFIG = tiny_config(
    hidden_size=256, moe_intermediate_size=256, q_lora_rank=256, kv_lora_rank=256, v_head_dim=64,
    num_hidden_layers=3, indexer_types=["full", "shared", "full"],
)  # fmt: skip
KINDS = [
    kind.name
    for kind in GGML_TYPES.values()
    if (fmt := format_of(kind.name)) is not None and fmt.mode != "dense"
]
FORMS = [{}, {"kv_b": "joined"}, {"experts": "joined"}]
TOKENS = [(i * 37 + 11) % 250 for i in range(40)]
DENSE = ("_norm.weight", "ffn_gate_inp.weight", "token_embd.weight", "indexer.proj.weight")


def blocks(kind, values, seed):
    """Blocks of random bits that are numbers of about the values' size."""
    weight = Bits(seed).weight(values.shape, format_of(kind.name), mx.float32)
    return np.array(weight.planes[0])


def packed_tensors(config, kind_of, **options):
    """The tensors of a file: those that may be blocks are of the type ``kind_of(name)``."""
    packed = {}
    for seed, (name, values) in enumerate(gguf_tensors(config, dtype="float32", **options).items()):
        kind = kind_of(name)
        columns = gguf.GGML_QUANT_SIZES[kind][0]
        if values.ndim > 1 and not name.endswith(DENSE) and values.shape[-1] % columns == 0:
            packed[name] = blocks(kind, values, seed), kind
        else:
            packed[name] = values, Q.F32
    return packed


def packed_and_dense(path, config, kind_of, **options):
    """Two files of the same values: as blocks, where they may be, and as float32."""
    packed = packed_tensors(config, kind_of, **options)
    dense = {name: gguf.quants.dequantize(*tensor) for name, tensor in packed.items()}
    files = path / "packed.gguf", path / "dense.gguf"
    write_gguf(files[0], config, raw=packed)
    write_gguf(files[1], config, dtype="float32", edit=lambda _: dense)
    return files


def logits(path, **options):
    model, _ = load_model(path, **options)
    cache = model.make_cache()
    parts = [model(mx.array([TOKENS]), cache)]
    for token in (3, 5, 7):
        parts.append(model(mx.array([[token]]), cache))
    result = mx.concatenate(parts, axis=1)
    mx.eval(result)
    return result


def distance(a, b):
    """The relative distance of the median token, whose experts rounding does not change."""
    apart = mx.linalg.norm(a - b, axis=-1) / mx.linalg.norm(b, axis=-1)
    return mx.median(apart).item()


def test_each_block_format_is_a_type_of_ggml():
    assert {format_of(kind) for kind in KINDS} == set(GGUF)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_values(tmp_path, kind):
    packed, dense = packed_and_dense(tmp_path, CONFIG, lambda name: Q[kind])
    found, expected = logits(packed), logits(dense)
    assert found.dtype == mx.float32
    assert distance(found, expected) < 1e-4
    assert describe(packed)["formats"]["experts down"]["formats"] == [str(format_of(kind))]
    with reference_path():
        assert mx.array_equal(found, logits(packed)).item()
    assert mx.array_equal(found, logits(packed, stream=StreamOptions(slots=3))).item()


@pytest.mark.parametrize("form", FORMS)
def test_mixes_of_types_and_joined_tensors(tmp_path, form):
    kinds = {"ffn_down_exps": "Q8_0", "attn_": "Q6_K", "shexp": "IQ4_XS", "output": "Q8_0"}

    def kind_of(name):
        return Q[next((kind for part, kind in kinds.items() if part in name), "IQ2_XXS")]

    packed, dense = packed_and_dense(tmp_path, CONFIG, kind_of, **form)
    found, expected = logits(packed), logits(dense)
    # A joined kv_b_proj gives embed_q as bfloat16, since its rows are transposed.
    assert distance(found, expected) < (0.02 if form.get("kv_b") else 1e-4)
    with reference_path():
        assert mx.array_equal(found, logits(packed)).item()
    assert mx.array_equal(found, logits(packed, stream=StreamOptions(slots=3))).item()
    pack(packed, tmp_path / "sidecar")
    options = StreamOptions(slots=3, sidecar=tmp_path / "sidecar")
    assert mx.array_equal(found, logits(packed, stream=options)).item()
    export(packed, tmp_path / "flash-moe")
    with pytest.raises(FileExistsError, match="not empty, expected an empty or new folder"):
        export(packed, tmp_path / "flash-moe")
    options = StreamOptions(slots=3, sidecar=tmp_path / "flash-moe")
    assert mx.array_equal(found, logits(packed, stream=options)).item()


@pytest.mark.parametrize("form", FORMS[:2])
def test_formats_that_mlx_does_not_know_become_dense_for_its_tools(tmp_path, form):
    packed, _ = packed_and_dense(tmp_path, CONFIG, lambda name: Q.Q8_0, **form)
    with Engine(packed, tokenizer=False, only_mlx_formats=True) as engine:
        weights = dict(tree_flatten(engine.model.parameters()))
        assert {array.dtype for array in weights.values()} == {mx.bfloat16, mx.float32}
        found = engine.step(mx.array([TOKENS]))
        assert "quantization_config" not in engine.config
    assert distance(found, logits(packed)[:, : len(TOKENS)]) < 0.02


@pytest.mark.parametrize("kind", KINDS[:1])
def test_a_packed_embedding_makes_bfloat16_activations(tmp_path, kind):
    def types(name):
        return Q[kind] if name.endswith(("token_embd.weight", "output.weight")) else None

    model, _ = load_model(write_gguf(tmp_path / "m.gguf", types=types))
    assert model(mx.array([TOKENS])).dtype == mx.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_no_numbers_are_refused(tmp_path, kind):
    """Wherever a block has one; of all bits set every scale is NaN."""
    name = "blk.2.ffn_up_exps.weight"
    packed = tmp_path / "packed.gguf"
    write_gguf(packed, CONFIG, raw=packed_tensors(CONFIG, lambda name: Q[kind]))
    (tensor,) = (t for t in gguf.GGUFReader(packed).tensors if t.name == name)
    size = gguf.GGML_QUANT_SIZES[Q[kind]][1]
    expected = r"layers.2.mlp.switch_mlp.up_proj.weight has a block's scale (nan|255) at \[0, 3, 0"
    first = tensor.data_offset + 3 * tensor.data[0][0].nbytes
    content = bytearray(packed.read_bytes())
    content[first : first + size] = b"\xff" * size
    packed.write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        load_model(packed)


@pytest.mark.parametrize("only_mlx_formats", [False, True])
def test_scales_of_a_joined_kv_b_proj_are_looked_at(tmp_path, only_mlx_formats):
    packed, _ = packed_and_dense(tmp_path, CONFIG, lambda name: Q.Q8_0, kv_b="joined")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(packed, "r+").tensors}
    last = tensors["blk.1.attn_kv_b.weight"].data[-1, -34:]
    last[:2] = 0x00, 0x7C  # infinity
    last.flush()
    with pytest.raises(ValueError, match=r"1.self_attn.kv_b_proj.weight has a block's scale inf"):
        Engine(packed, tokenizer=False, only_mlx_formats=only_mlx_formats)
