"""What is exported for Flash-MoE is the model, in two parts; verify says whether it still is."""

import json
import re
import shutil

import gguf
import pytest
from conftest import tiny_config, write_checkpoint
from gguf_files import gguf_tensors, tokenizer_metadata, write_gguf
from test_flashmoe import LAYOUTS, is_expert
from test_flashmoe import export as written_by_others
from test_gguf import write_shards
from test_streaming import AFFINE, run, same, stream

from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.cli import main
from glm_fused.loader import load_model

DENSE = "dense/model-dense.gguf"


@pytest.fixture(scope="module", params=["split", "joined"])
def whole(request, tmp_path_factory):
    """A model with a tokenizer and an MTP layer, at an alignment of its own."""
    values = tokenizer_metadata(bundled_folder()) | {"general.alignment": 64}
    return write_gguf(
        tmp_path_factory.mktemp("whole") / "whole.gguf",
        tiny_config(vocab_size=2048),
        experts=request.param,
        mtp=True,
        values=values,
    )


@pytest.fixture
def exported(whole, tmp_path, capsys):
    assert main(["sidecar", "export", "--model", str(whole), str(tmp_path / "sidecar")]) == 0
    assert f"--model {tmp_path}/sidecar/{DENSE} --sidecar" in capsys.readouterr().out
    return tmp_path / "sidecar"


def contents(path):
    """The keys of a file as they lie in it, and the type, shape and bytes of each tensor."""
    reader = gguf.GGUFReader(path)
    fields = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "split."))
    }
    tensors = {t.name: (t.tensor_type, list(t.shape), t.data.tobytes()) for t in reader.tensors}
    return fields, tensors


def is_routed(name):
    """Whether it is of routed experts of a decoder layer; those of MTP's are not exported."""
    return is_expert(name) and not name.startswith("blk.5.")


def test_the_dense_part_is_the_file_without_its_experts(whole, exported):
    fields, tensors = contents(whole)
    expected = {name: tensor for name, tensor in tensors.items() if not is_routed(name)}
    assert len(expected) < len(tensors)
    assert contents(exported / DENSE) == (fields, expected)


def test_the_pair_runs_with_the_bits_of_the_whole(whole, exported, capsys):
    model, _ = load_model(exported / DENSE, stream=stream(4, sidecar=exported))
    assert same(run(model), run(load_model(whole)[0]))
    texts = []
    for arguments in (
        ["--model", str(whole)],
        ["--model", str(exported / DENSE), "--sidecar", str(exported), "--slots", "3"],
    ):
        more = ["--prompt", "def main():", "--max-tokens", "4", "--raw", "--json"]
        assert main(["generate", *arguments, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_shards_become_one_file(tmp_path):
    first = write_shards(tmp_path, 3)
    assert main(["sidecar", "export", "--model", str(first), str(tmp_path / "sidecar")]) == 0
    model, _ = load_model(
        tmp_path / "sidecar" / DENSE, stream=stream(4, sidecar=tmp_path / "sidecar")
    )
    assert same(run(model), run(load_model(first)[0]))


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def verify(capsys, sidecar, *more):
    """The exit code, and what is wrong by name."""
    code = main(["sidecar", "verify", str(sidecar), "--json", *map(str, more)])
    return code, json.loads(capsys.readouterr().out)["wrong"]


def test_verify_says_what_is_damaged(whole, exported, capsys):
    assert main(["sidecar", "verify", str(exported), "--model", str(whole)]) == 0
    assert f"{DENSE}  ok" in capsys.readouterr().out
    flip(exported / "layer_002.bin", 5)
    flip(exported / DENSE, -70)
    code, wrong = verify(capsys, exported)
    assert code == 1 and re.fullmatch("SHA-256 .*, expected .*", *wrong.values())
    code, wrong = verify(capsys, exported, "--model", whole)
    (tensor,) = wrong.keys() - {DENSE}
    assert code == 1 and re.fullmatch("blk.2.ffn_(down|gate|gate_up)_exps.weight", tensor)
    assert wrong[tensor].endswith("; experts [0] are not the model's")
    assert re.fullmatch(r"[a-z0-9_.]+\.(weight|bias) is not the model's", wrong[DENSE])


def test_verify_says_what_the_dense_part_lacks(whole, exported, capsys):
    def edit(tensors):
        rest = {name: values for name, values in tensors.items() if not is_expert(name)}
        rest["output_norm.weight"] = rest["output_norm.weight"][:-1]
        del rest["blk.1.attn_q_a.weight"], rest["token_embd.weight"]
        return rest

    write_gguf(exported / DENSE, tiny_config(vocab_size=2048), edit=edit)
    code, wrong = verify(capsys, exported, "--model", whole)
    assert code == 1 and list(wrong) == [DENSE]
    assert "output_norm.weight is F32 [127], the model has F32 [128]" in wrong[DENSE]
    assert "token_embd.weight, blk.1.attn_q_a.weight" in wrong[DENSE]


@pytest.mark.parametrize("layout", ["mlx", "hf", "hf-fused"])
@pytest.mark.parametrize("of", LAYOUTS[:2])
def test_verify_against_safetensors(tmp_path, layout, of, capsys):
    model = write_checkpoint(tmp_path / "model", layout=layout)
    sidecar = written_by_others(tmp_path / "sidecar", gguf_tensors(tiny_config()), of)
    assert verify(capsys, sidecar, "--model", model) == (0, {})
    other = write_checkpoint(tmp_path / "other", layout=layout, seed=1)
    code, wrong = verify(capsys, sidecar, "--model", other)
    assert code == 1 and len(wrong) == 12
    assert set(wrong.values()) == {"experts [0, 1, 2, 3, 4, 5, ...] are not the model's"}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"quantization": AFFINE}, "layer 1 of .* has down_proj.weight U32 .*, down_proj.scal"),
        ({"n_routed_experts": 6}, {}, r"is BF16 \[8, 128, 128\], but .* has 6 experts there"),
        ({"first_k_dense_replace": 2}, {}, "layer 1 of .* has no tensors"),
    ],
)
def test_verify_against_a_model_of_another_form(tmp_path, config, options, message, capsys):
    model = write_checkpoint(tmp_path / "model", tiny_config(**config), **options)
    sidecar = written_by_others(tmp_path / "sidecar", gguf_tensors(tiny_config()))
    assert main(["sidecar", "verify", str(sidecar), "--model", str(model)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_sidecar_without_checksums_has_to_be_compared(tmp_path, capsys):
    sidecar = written_by_others(tmp_path / "sidecar", gguf_tensors(tiny_config()), LAYOUTS[2])
    assert main(["sidecar", "verify", str(sidecar)]) == 2
    assert "has no checksums, name the model" in capsys.readouterr().err


def refused(capsys, model, folder):
    assert main(["sidecar", "export", "--model", str(model), str(folder)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(whole, exported, tmp_path, capsys):
    assert f"{exported} is not empty" in refused(capsys, whole, exported)
    assert f"{whole} is a file, expected a folder" in refused(capsys, whole, whole)
    assert "missing tensors: blk.1." in refused(capsys, exported / DENSE, tmp_path / "other")
    folder = write_checkpoint(tmp_path / "model")
    error = refused(capsys, folder, tmp_path / "other")
    assert f"{folder} is a folder of safetensors, expected a GGUF file" in error
    dense = write_gguf(tmp_path / "dense.gguf", tiny_config(first_k_dense_replace=5))
    assert "dense.gguf has no routed experts" in refused(capsys, dense, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_an_export_that_fails_leaves_nothing(whole, tmp_path, existed, monkeypatch, capsys):
    folder = tmp_path / "sidecar"
    if existed:
        folder.mkdir()
    copy = shutil.copy(whole, tmp_path / "copy.gguf")

    def shrink(*_):
        with open(copy, "r+b") as file:
            file.truncate(5000)

    monkeypatch.setattr("glm_fused.streaming.flashmoe_export.check_space", shrink)
    assert "copy.gguf ends before byte" in refused(capsys, copy, folder)
    assert [p.name for p in tmp_path.iterdir() if p.name != "copy.gguf"] == ["sidecar"] * existed
    monkeypatch.undo()
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "needed, 1.00 kB free" in refused(capsys, whole, folder)
    assert [p.name for p in tmp_path.iterdir() if p.name != "copy.gguf"] == ["sidecar"] * existed
