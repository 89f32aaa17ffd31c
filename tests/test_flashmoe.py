"""Flash-MoE sidecars, as another exporter writes them, beside a GGUF file without the experts."""

import json
import random

import gguf
import pytest
from conftest import tiny_config
from gguf_files import gguf_tensors, write_gguf
from test_streaming import run, same, stream
from tests.adversarial import harness

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.identity import checkpoint_id
from glm_fused.cli import main
from glm_fused.loader import load_model
from glm_fused.streaming.flashmoe import with_experts

LAYOUTS = ("layer_major_whole_tensor", "layer_major_expert", "expert_major")


def is_expert(name):
    return "_exps." in name


def export(folder, tensors, layout=LAYOUTS[0], kind=gguf.GGMLQuantizationType.BF16):
    """Write a sidecar of `{GGUF name: float32 array}`, from its published description alone."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, _ = gguf.GGML_QUANT_SIZES[kind]
    by_layer, entries = {}, []
    for name in sorted(name for name in tensors if is_expert(name)):
        by_layer.setdefault(int(name.split(".")[1]), []).append(name)
    for layer, names in by_layer.items():
        blocks = {name: gguf.quants.quantize(tensors[name], kind).view("u1") for name in names}
        per_expert = {name: blocks[name][0].nbytes for name in names}
        experts, data, at = len(blocks[names[0]]), b"", 0
        stride = sum(per_expert.values())
        for name in names:
            entries.append(
                {
                    "layer": layer,
                    "tensor_family": name.split(".")[2],
                    "tensor_name": name,
                    "original_gguf_tensor_name": name,
                    "expert_id": None,
                    "quant_type": kind.name.lower(),
                    "block_size": columns,
                    "exact_byte_length": experts * per_expert[name],
                    "source_shard": "model.gguf",
                    "source_shard_index": 0,
                    "source_offset": 7,
                    "shape": list(reversed(tensors[name].shape)),
                    "bytes_per_expert": per_expert[name],
                    "repacked_file": f"layer_{layer:03d}.bin",
                    "repacked_offset": at,
                }
            )
            if layout == LAYOUTS[0]:
                data += blocks[name].tobytes()
                at += experts * per_expert[name]
            else:
                entries[-1] |= {"expert_major": True, "expert_stride": stride}
                at += per_expert[name]
        if layout != LAYOUTS[0]:
            data = b"".join(blocks[name][e].tobytes() for e in range(experts) for name in names)
        (folder / f"layer_{layer:03d}.bin").write_bytes(data)
    manifest = {
        "schema_version": 1,
        "sidecar_kind": "flashmoe_gguf",
        "layout": layout,
        "generated_at": "2026-08-01T00:00:00Z",
        "include_shared": False,
        "filters": {"layers": None, "families": None},
        "source": {"model_files": ["model.gguf"]},
        "model": {"arch": "glm-dsa", "expert_count": 8, "expert_used_count": 2},
        "entries": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module", params=["split", "joined"])
def drawn(request):
    return gguf_tensors(tiny_config(), experts=request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, drawn):
    """The model without its routed experts, and the logits that it has with them."""
    folder = tmp_path_factory.mktemp("dense")
    whole = write_gguf(folder / "whole.gguf", edit=lambda _: drawn)
    rest = {name: values for name, values in drawn.items() if not is_expert(name)}
    path = write_gguf(folder / "model-dense.gguf", edit=lambda _: rest)
    return path, whole, run(load_model(whole)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_those_of_the_whole_model(dense, drawn, tmp_path, layout):
    path, whole, expected = dense
    sidecar = export(tmp_path / "sidecar", drawn, layout)
    for file in (path, whole):
        for slots in (2, 8):
            model, _ = load_model(file, stream=stream(slots, sidecar=sidecar))
            assert same(run(model), expected)
    assert model.streaming.source.kind == "flash-moe sidecar"


def test_other_experts_beside_a_file_are_another_checkpoint(dense, drawn, tmp_path):
    """Several processes that share a model compare that, as do those that keep its prompts."""
    other = {name: values + 1 for name, values in drawn.items() if is_expert(name)}
    folders = [
        export(tmp_path / str(i), experts) for i, experts in enumerate((drawn, drawn, other))
    ]
    opened = Checkpoint.open(dense[0])
    ids = [checkpoint_id(with_experts(opened, folder)) for folder in folders]
    assert ids[0] == ids[1] != ids[2]


def test_another_model_s_experts_are_refused(dense, drawn, tmp_path):
    other = {name: values + 1 for name, values in drawn.items() if is_expert(name)}
    sidecar = export(tmp_path / "sidecar", other)
    with pytest.raises(ValueError, match=r"layer 1, expert 0: .* is not the checkpoint's"):
        load_model(dense[1], stream=stream(4, sidecar=sidecar))
    wide = {name: values[:, :, :64] for name, values in drawn.items() if is_expert(name)}
    sidecar = export(tmp_path / "wide", wide)
    with pytest.raises(ValueError, match=r"model.layers.1.* is BF16 \[8, .*64\], but .* has BF16"):
        load_model(dense[1], stream=stream(4, sidecar=sidecar))
    with pytest.raises(ValueError, match=r"_exps.weight .* is BF16 \[8, .*64\], expected \[8"):
        load_model(dense[0], stream=stream(4, sidecar=sidecar))


def test_without_its_sidecar_the_file_lacks_experts(dense):
    with pytest.raises(ValueError, match=r"12 missing tensors: blk.1.ffn_gate_exps.weight"):
        load_model(dense[0])


def test_generate(dense, drawn, tmp_path, capsys):
    sidecar = export(tmp_path / "sidecar", drawn)
    arguments = ["generate", "--model", str(dense[0]), "--sidecar", str(sidecar), "--prompt", "x"]
    assert main([*arguments, "--slots", "4"]) == 2  # the model has no tokenizer
    assert "key 'tokenizer.ggml.model' missing" in capsys.readouterr().err


def top_level(rng, manifest, entry, folder):
    changes = {
        "schema_version": [0, 2, "1", True, None],
        "sidecar_kind": ["flashmoe_mlx", "", None, 1],
        "layout": ["slabs", LAYOUTS[1], LAYOUTS[2], None, 3, []],
        "entries": [[], {}, None, "x", [1], [None]],
    }
    key = rng.choice(list(changes))
    manifest[key] = rng.choice(changes[key])


def value(rng, manifest, entry, folder):
    changes = {
        "layer": [-1, 0, 7, 2**40, "1", 1.5, True],
        "tensor_family": ["attn_q_a", "", None, 3],
        "tensor_name": ["blk.9.ffn_up_exps.weight", "", 3],
        "expert_id": [0, "0"],
        "quant_type": ["q9_k", "", None, 30, "i8"],
        "block_size": [2, 0, "1"],
        "exact_byte_length": [0, -1, entry["exact_byte_length"] - 1, 2**70, None],
        "shape": [[], None, [128, 128], [128, 128, 0], [128, 128, 9], [2**31, 2**31, 2**31]],
        "bytes_per_expert": [0, 1, 2**64, None, float(entry["bytes_per_expert"])],
        "repacked_offset": [-1, 1, 2**62, 2**80, None, "0"],
        "repacked_file": ["../layer_001.bin", "/etc/passwd", "", "layer_999.bin", None, "a\\b"],
        "expert_major": [True, 1, "yes"],
    }
    key = rng.choice(list(changes))
    entry[key] = rng.choice(changes[key])


def absence(rng, manifest, entry, folder):
    del entry[rng.choice(["layer", "tensor_family", "quant_type", "shape", "bytes_per_expert",
                          "exact_byte_length", "repacked_file", "repacked_offset"])]  # fmt: skip


def entries(rng, manifest, entry, folder):
    kind = rng.randrange(3)
    if kind == 0:
        manifest["entries"].remove(entry)
    elif kind == 1:
        manifest["entries"].append(dict(entry))
    else:
        offsets = {e["repacked_offset"] for e in manifest["entries"]} - {entry["repacked_offset"]}
        entry["repacked_offset"] = rng.choice(sorted(offsets))


def files(rng, manifest, entry, folder):
    file = folder / entry["repacked_file"]
    kind = rng.randrange(4)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(file.read_bytes()[: -rng.randrange(1, 5000)])
    elif kind == 2:
        outside = folder.parent / f"outside-{file.name}"
        file.replace(outside)
        file.symlink_to(outside)
    else:
        file.unlink()
        file.mkdir()


MUTATIONS = (top_level, value, absence, entries, files)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_sidecars_are_refused(dense, drawn, tmp_path, seed):
    folder, rng = export(tmp_path / "sidecar", drawn), random.Random(seed)
    manifest = json.loads((folder / "manifest.json").read_text())
    before = json.dumps(manifest)
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    mutation(rng, manifest, rng.choice(manifest["entries"]), folder)
    assert mutation is files or json.dumps(manifest) != before
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ValueError, OSError)) as error:
        load_model(dense[0], stream=stream(4, sidecar=folder))
    assert harness.clear_error(error.value), error.value
    assert any(str(path) in str(error.value) for path in (folder, dense[0]))


def test_other_manifests_are_not_taken_for_it(dense, tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "x"}')
    with pytest.raises(ValueError, match="is \\('x', None\\), expected"):
        load_model(dense[1], stream=stream(4, sidecar=tmp_path))


def test_inspect_says_what_the_model_with_its_sidecar_is(dense, drawn, tmp_path, capsys):
    path, whole, _ = dense
    sidecar = export(tmp_path / "sidecar", drawn)
    descriptions = []
    for arguments in ([str(whole)], [str(path), "--sidecar", str(sidecar)]):
        assert main(["inspect", *arguments, "--json"]) == 0
        descriptions.append(json.loads(capsys.readouterr().out))
    files = len(list(sidecar.glob("*.bin")))
    assert [found.pop("files") for found in descriptions] == [1, 1 + files]
    for found, source in zip(descriptions, ("memory", "flash-moe sidecar"), strict=True):
        found.pop("path")
        found["bytes_on_disk"] -= found["bytes_on_disk"] % 100_000  # headers differ
        assert {layer.pop("experts_from") for layer in found["each_layer"]} == {None, source}
    assert descriptions[0] == descriptions[1]
    assert main(["inspect", str(path), "--sidecar", str(tmp_path)]) == 2
    assert f"{tmp_path} has no manifest.json" in capsys.readouterr().err


def test_sidecar_inspect_names_tensors_and_types(drawn, tmp_path, capsys):
    sidecar = export(tmp_path / "sidecar", drawn)
    assert main(["sidecar", "inspect", str(sidecar), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["files"]
    assert [file["file"] for file in found] == sorted(p.name for p in sidecar.glob("*.bin"))
    assert [file["bytes"] for file in found] == [
        (sidecar / file["file"]).stat().st_size for file in found
    ]
    tensors = {name: text for file in found for name, text in file["tensors"].items()}
    shapes = {name: list(values.shape) for name, values in drawn.items() if is_expert(name)}
    assert tensors == {name: f"BF16 {shape}" for name, shape in shapes.items()}
    assert main(["sidecar", "inspect", str(sidecar)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in tensors)


def test_the_hub_s_cache_is_read_through_its_links(dense, drawn, tmp_path):
    """Its snapshots are links to files in a folder beside them; other links out are refused."""
    path, _, expected = dense
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    export(snapshot, drawn)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(f"../../blobs/{i}")
    model, _ = load_model(path, stream=stream(4, sidecar=snapshot))
    assert same(run(model), expected)
    link = next(snapshot.glob("*.bin"))
    (tmp_path / "elsewhere").write_bytes(link.read_bytes())
    link.unlink()
    link.symlink_to("../../elsewhere")
    with pytest.raises(ValueError, match="leads out of the folder"):
        load_model(path, stream=stream(4, sidecar=snapshot))
