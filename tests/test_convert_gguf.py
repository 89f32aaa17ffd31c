"""GGUF files that convert writes: as the gguf package writes the same values, and they run."""

import json
import re
import shutil
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, tiny_config_51, write_checkpoint
from expert_counts import unlike_experts
from formats_under_test import assert_same_bits
from gguf_files import Q, gguf_tensors, metadata, write_gguf
from test_flashmoe_export import contents
from test_gguf_tokenizer import TEXTS, original  # noqa: F401  a fixture
from test_mtp_models import drafts_of
from test_streaming import AFFINE, run, same

from glm_fused.checkpoint.description import describe
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.cli import main
from glm_fused.conversion.gguf import TYPES
from glm_fused.generation.chat import render
from glm_fused.generation.tokenizer import load_tokenizer
from glm_fused.loader import load_model

KINDS = {"bf16": Q.BF16, "fp16": Q.F16, "fp32": Q.F32} | {
    name: Q[name.removeprefix("ggml-").upper()] for name in TYPES[3:]
}
YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def convert(model, out, *more):
    assert main(["convert", "--model", str(model), str(out), *more]) == 0
    return out


@pytest.mark.parametrize("layout", ["mlx", "hf", "hf-fused"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_written_is_what_others_write(tmp_path, layout, dtype):
    """Every key with its type, and every tensor, in the order of the model."""
    folder = write_checkpoint(tmp_path / "model", layout=layout, dtype=dtype)
    found, tensors = contents(convert(folder, tmp_path / "m.gguf"))
    keys, expected = contents(write_gguf(tmp_path / "other.gguf", dtype=dtype))
    assert keys.items() <= found.items()
    more = {"general.type", "general.name", "general.quantization_version"}
    assert found.keys() - keys.keys() == more | {"tokenizer.ggml.model"}
    assert tensors == expected
    model, _ = load_model(tmp_path / "m.gguf")
    assert same(run(model), run(load_model(folder)[0]))


@pytest.mark.parametrize("name", TYPES)
def test_types(tmp_path, name):
    """Of experts and the others; routers and norms are float32, and indexers as they are."""
    folder = write_checkpoint(tmp_path / "model")
    path = convert(folder, tmp_path / "m.gguf", "--experts", name, "--dense", "q8_0")
    drawn = gguf_tensors(tiny_config())
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} == drawn.keys()
    for tensor in reader.tensors:
        kind = KINDS[name] if "_exps" in tensor.name else Q.Q8_0
        kind = Q.BF16 if ".indexer." in tensor.name else kind
        if drawn[tensor.name].ndim == 1 or "_norm" in tensor.name or "gate_inp" in tensor.name:
            kind = Q.F32
        expected = gguf.quants.quantize(drawn[tensor.name], kind)
        assert tensor.tensor_type == kind
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name
    assert describe(path)["formats"]["experts up"]["formats"] == [name]
    model, _ = load_model(path)
    assert all(np.isfinite(logits.view(np.float16)).any() for logits in run(model, 1))


@pytest.mark.parametrize("name", TYPES[:3])
def test_indexers_take_floats(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model", dtype="float16")
    path = convert(folder, tmp_path / "m.gguf", "--dense", name)
    found = {kind: each["formats"] for kind, each in describe(path)["formats"].items()}
    assert set(found["indexer"]) - {"fp32"} == {name} - {"fp32"}
    assert found["head"] == [name] and found["experts up"] == ["fp16"]
    assert found["router"] == found["norms"] == ["fp32"]


@pytest.mark.parametrize(
    "quantization",
    [AFFINE, {"group_size": 16, "bits": 4, "mode": "nvfp4"}],
    ids=["affine", "nvfp4"],
)
def test_packed_weights_become_floats_first(tmp_path, quantization):
    folder = write_checkpoint(tmp_path / "model", quantization=quantization)
    stored = mx.load(str(folder / "model.safetensors"))
    path = convert(folder, tmp_path / "m.gguf", "--experts", "fp32", "--dense", "fp32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in (
        ("model.layers.1.mlp.switch_mlp.down_proj", "blk.1.ffn_down_exps.weight"),
        ("model.layers.2.self_attn.embed_q", "blk.2.attn_k_b.weight"),
        ("model.layers.1.mlp.shared_experts.up_proj", "blk.1.ffn_up_shexp.weight"),
        ("lm_head", "output.weight"),
    ):
        planes = [stored.get(f"{ours}.{part}") for part in ("weight", "scales", "biases")]
        values = mx.dequantize(*planes, **quantization, dtype=mx.float32)
        assert np.array_equal(np.array(values), found[theirs])


def test_fp8_becomes_floats_first(tmp_path):
    folder = write_checkpoint(tmp_path / "model", layout="fp8")
    stored = mx.load(str(folder / "model.safetensors"))
    path = convert(folder, tmp_path / "m.gguf", "--experts", "fp32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for e in range(8):
        name = f"model.layers.1.mlp.experts.{e}.up_proj.weight"
        values = mx.from_fp8(stored[name], mx.float32) * stored[f"{name}_scale_inv"]
        assert np.array_equal(np.array(values), found["blk.1.ffn_up_exps.weight"][e])


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(rope_parameters=YARN),
        tiny_config(rope_parameters=YARN | {"mscale_all_dim": 0.5, "attention_factor": 1.25}),
        tiny_config(n_group=2, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.5),
        tiny_config(tie_word_embeddings=True),
        tiny_config(n_shared_experts=0, eos_token_id=7),
        tiny_config_51(max_position_embeddings=1 << 20),
    ],
    ids=["yarn", "yarn with factors", "groups", "tied", "no shared experts", "all full"],
)
def test_configs(tmp_path, config):
    folder = write_checkpoint(tmp_path / "model", config)
    path = convert(folder, tmp_path / "m.gguf")
    assert same(run(load_model(path)[0]), run(load_model(folder)[0]))


@pytest.mark.parametrize("indexer_types", [False, True])
def test_the_keys_are_those_of_llama_cpp(tmp_path, indexer_types):
    config = tiny_config() if indexer_types else tiny_config_51()
    path = convert(write_checkpoint(tmp_path / "model", config), tmp_path / "m.gguf")
    found = Checkpoint.open(path).metadata
    assert metadata(config).items() <= {k: plain(v) for k, v in found.items()}.items()


def plain(value):
    return float(str(np.float32(value))) if isinstance(value, float) else value


@pytest.mark.parametrize("layout", ["hf", "mlx"])
def test_the_mtp_layer_is_kept(tmp_path, layout):
    folder = write_checkpoint(tmp_path / "model", layout=layout, mtp=True, shared_indexers=True)
    path = convert(folder, tmp_path / "m.gguf")
    assert describe(path)["mtp_layers"][0]["missing"] == []
    (found, expected) = (load_model(p, mtp=True)[0] for p in (path, folder))
    assert same(run(found), run(expected))
    for ours, theirs in zip(drafts_of(found), drafts_of(expected), strict=True):
        assert_same_bits(ours, theirs)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert {f"blk.5.nextn.{n}.weight" for n in ("eh_proj", "enorm", "shared_head_norm")} <= names


def test_a_part_of_an_mtp_layer_is_left_out(tmp_path, capsys):
    def without_a_norm(tensors):
        return {name: array for name, array in tensors.items() if ".5.hnorm" not in name}

    folder = write_checkpoint(tmp_path / "model", mtp=True, edit=without_a_norm)
    path = convert(folder, tmp_path / "m.gguf")
    assert "layer 5, which is for MTP, is left out" in capsys.readouterr().err
    assert describe(path)["mtp_layers"] == []
    assert same(run(load_model(path)[0]), run(load_model(folder)[0]))


def test_what_drafts_share_is_not_asked_of_a_file(tmp_path):
    """GGUF has no key for it."""
    config = tiny_config(index_share_for_mtp_iteration=False)
    path = convert(write_checkpoint(tmp_path / "model", config), tmp_path / "m.gguf")
    assert load_model(path)[0].args.index_share_for_mtp_iteration


def with_tokenizer(folder, source, **config):
    write_checkpoint(folder, tiny_config(vocab_size=2060, **config))
    for file in source.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def test_the_tokenizer_is_the_original_s(tmp_path, original, capsys):  # noqa: F811
    folder = with_tokenizer(tmp_path / "model", original, eos_token_id=[0, 2049])
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    path = convert(folder, tmp_path / "m.gguf")
    assert "tokenizer.json" not in capsys.readouterr().err
    keys = Checkpoint.open(path).metadata
    assert keys["tokenizer.ggml.pre"] == "glm4" and "tokenizer.huggingface.json" not in keys
    assert len(keys["tokenizer.ggml.tokens"]) == 2060  # as many as the embedding has rows
    its, mine = (load_tokenizer(Checkpoint.open(p)) for p in (folder, path))
    assert [mine.encode(text) for text in TEXTS] == [its.encode(text) for text in TEXTS]
    assert set(mine.eos_token_ids) == {0, 2049}
    assert mine.decode(render(mine, [{"role": "user", "content": "Hi"}])) == "<user>Hi"


@pytest.mark.parametrize("change", ["words", "normalizer", "lstrip", "byte_fallback"])
def test_a_tokenizer_of_another_kind_is_taken_whole(tmp_path, original, change, capsys):  # noqa: F811
    folder = with_tokenizer(tmp_path / "model", original)
    if change == "words":
        shutil.copy(bundled_folder() / "tokenizer.json", folder)
    else:
        content = json.loads((folder / "tokenizer.json").read_text())
        if change == "normalizer":
            content["normalizer"] = {"type": "NFC"}
        elif change == "lstrip":
            content["added_tokens"][1]["lstrip"] = True
        else:
            content["model"]["byte_fallback"] = True
        (folder / "tokenizer.json").write_text(json.dumps(content))
    path = convert(folder, tmp_path / "m.gguf")
    assert "tokenizer.json is not GLM's kind" in capsys.readouterr().err
    its, mine = (load_tokenizer(Checkpoint.open(p)) for p in (folder, path))
    assert [mine.encode(text) for text in TEXTS] == [its.encode(text) for text in TEXTS]


def test_the_bundled_model(tmp_path, capsys):
    path = convert("demo", tmp_path / "m.gguf")
    capsys.readouterr()
    assert main(["generate", "--model", str(path), "--prompt", "def main():", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) > 10


def refused(capsys, model, out, *more):
    code = main(["convert", "--model", str(model), str(out), *more])
    assert code == 2 and not list(out.parent.glob("*.tmp"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--experts", "q4_k"], "--experts: 'q4_k', expected one of bf16, fp16, fp32, q8_0, q5_0"),
        (["--dense", "Q8_0"], "--dense: 'Q8_0', expected one of"),
        (["--dense", ""], "expected a text that is not empty"),
        (["--expert", "q8_0"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, more, message):
    try:
        code = main(["convert", "--model", "demo", str(tmp_path / "m.gguf"), *more])
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": [1, 2, 3, 4]}, r"eos_token_id is \[1, 2, 3, 4\], expected at most 3"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]}, "mlp_layer_types"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave is False, which GGUF can"),
        ({"rope_parameters": YARN | {"truncate": False}}, "rope_parameters.truncate is False"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path, capsys, config, message):
    def edit(tensors):
        for name in [n for n in tensors if ".layers.2.mlp." in n and "mlp_layer_types" in config]:
            del tensors[name]
        if "mlp_layer_types" in config:
            dense = {n: a for n, a in tensors.items() if ".layers.0.mlp." in n}
            tensors |= {n.replace(".0.", ".2."): a for n, a in dense.items()}

    folder = write_checkpoint(tmp_path / "model", tiny_config(**config), edit=edit)
    load_model(folder)
    assert re.search(message, refused(capsys, folder, tmp_path / "m.gguf"))


def test_unlike_numbers_of_experts_are_refused(tmp_path, capsys):
    def checkpoint(config, **options):
        return write_checkpoint(tmp_path / "model", config, **options)

    folder = unlike_experts(checkpoint, [0, 8, 6, 8, 4])
    error = refused(capsys, folder, tmp_path / "m.gguf")
    assert "num_routed_experts_per_layer is [" in error and "which GGUF cannot say" in error


def test_other_models_and_files_are_refused(tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf")
    assert f"{path} is a GGUF file, expected a folder" in refused(capsys, path, tmp_path / "n.gguf")
    folder = write_checkpoint(tmp_path / "model")
    error = refused(capsys, folder, folder / "m.gguf")
    assert "m.gguf and the checkpoint" in error and "lie in one another" in error
    assert "none does not exist" in refused(capsys, folder, tmp_path / "none" / "m.gguf")
    (tmp_path / "link").symlink_to(folder)
    assert "lie in one another" in refused(capsys, folder, tmp_path / "link" / "m.gguf")
    odd = write_checkpoint(tmp_path / "odd", tiny_config(moe_intermediate_size=100))
    error = refused(capsys, odd, tmp_path / "n.gguf", "--experts", "q4_0")
    assert "blk.1.ffn_down_exps.weight has rows of 100, expected a multiple of 32 for q4_0" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "does not load: "),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "expected 'BPE'"),
        ('{"model": {"type": "BPE", "vocab": {"a": 999}, "merges": ["a"]}}', "does not load: "),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 999, "b": 1, "ab": 0}, "merges": ["a b"]}}',
            "token 999, expected 0 to 255",
        ),
        ("{", "not valid JSON"),
    ],
)
def test_a_tokenizer_that_is_none(tmp_path, capsys, content, message):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    error = refused(capsys, folder, tmp_path / "m.gguf")
    assert re.search(f"model/tokenizer.json.*{message}", error), error


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "q8_0"), (7e4, "fp16")])
def test_values_that_are_no_numbers_leave_no_file(tmp_path, capsys, value, name):
    def edit(tensors):
        tensors["model.layers.2.mlp.switch_mlp.up_proj.weight"][5, 3, 7] = value

    folder, out = write_checkpoint(tmp_path / "model", edit=edit), tmp_path / "m.gguf"
    error = refused(capsys, folder, out, "--experts", name)
    assert f"blk.2.ffn_up_exps.weight has a value that is no finite number as {name}" in error
    assert not out.exists()


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    folder, out = write_checkpoint(tmp_path / "model"), tmp_path / "m.gguf"
    monkeypatch.setattr(gguf.quants, "quantize", interrupt)
    assert main(["convert", "--model", str(folder), str(out), "--experts", "q4_0"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    folder, out = write_checkpoint(tmp_path / "model"), tmp_path / "m.gguf"
    out.write_text("mine")
    assert f"{out} exists; --overwrite replaces it" in refused(capsys, folder, out)
    assert out.read_text() == "mine"
    convert(folder, out, "--overwrite")
    assert describe(out)["layers"] == 5


def test_shards(tmp_path, capsys, monkeypatch):
    folder, out = write_checkpoint(tmp_path / "model"), tmp_path / "m.gguf"
    more = ["--shard-size", "1MB", "--json"]
    convert(folder, out, *more)
    paths = sorted(tmp_path.glob("*.gguf"))
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "path": str(paths[0]),
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
    }
    count = len(paths)
    assert [path.name for path in paths] == [
        f"m-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)
    ]
    assert count > 2 and all(path.stat().st_size < 1_030_000 for path in paths)
    assert same(run(load_model(paths[0])[0]), run(load_model(folder)[0]))
    whole = contents(convert(folder, tmp_path / "whole.gguf"))[1]
    assert whole == {n: t for path in paths for n, t in contents(path)[1].items()}
    for field in ("split.no", "split.count"):  # llama.cpp reads no other types
        assert gguf.GGUFReader(paths[1]).fields[field].types == [gguf.GGUFValueType.UINT16]
    paths[0].unlink()
    assert f"{paths[1]} exists; --overwrite" in refused(capsys, folder, out, *more)
    for path in paths[1:]:
        path.unlink()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm_fused.checkpoint.gguf_writer.encode_entry", fail)
    assert "No space left" in refused(capsys, folder, out, *more)
    assert not list(tmp_path.glob("m-*"))
    assert "expected a size with its unit" in refused(capsys, folder, out, "--shard-size", "7")


def test_a_full_disk_and_a_missing_package(tmp_path, capsys, monkeypatch):
    folder, out = write_checkpoint(tmp_path / "model"), tmp_path / "m.gguf"
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "needed, 1.00 kB free" in refused(capsys, folder, out)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gguf", None)
    error = refused(capsys, folder, out, "--experts", "q4_0")
    assert "pip install 'glm-fused[convert]'" in error
    convert(folder, out, "--experts", "fp16")
