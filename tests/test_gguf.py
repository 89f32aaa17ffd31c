"""Models in GGUF files: what they load as, in every form that files have, and what is refused."""

import json
import re
import struct
from dataclasses import asdict

import gguf
import mlx.core as mx
import pytest
from conftest import tiny_config, tiny_config_51, write_checkpoint
from gguf_files import write_gguf
from tests.adversarial import harness
from tests.adversarial.kinds import gguf_header as headers

from glm_fused import Engine, _ext, load_model
from glm_fused.checkpoint.description import describe
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.gguf_names import gguf_name, model_name
from glm_fused.checkpoint.gguf_types import GGML_TYPES
from glm_fused.cli import main
from glm_fused.models.config import args_from_config
from glm_fused.models.tensors import layer_modules, modules
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack

TOKENS = [(i * 37 + 11) % 250 for i in range(60)]  # more than index_topk
SCHEDULE = ("index_topk_freq", "index_skip_topk_offset")
FORMS = [
    {},
    {"kv_b": "joined"},
    {"experts": "joined"},
    {"mtp": True},
    {"shared_indexers": True},
]


def logits_of(path, **options):
    """The logits of a prompt, and those of a few steps after it."""
    model, _ = load_model(path, **options)
    cache = model.make_cache()
    logits = [model(mx.array([TOKENS]), cache)[:, -20:]]
    for token in (3, 5, 7):
        logits.append(model(mx.array([[token]]), cache))
    return mx.concatenate(logits, axis=1)


def equal(a, b):
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_have_the_bits_of_the_same_weights_in_safetensors(device, tmp_path, dtype):
    expected = logits_of(write_checkpoint(tmp_path / "folder", dtype=dtype))
    for form in FORMS:
        assert equal(logits_of(write_gguf(tmp_path / "m.gguf", dtype=dtype, **form)), expected)
    assert not equal(logits_of(write_gguf(tmp_path / "m.gguf", dtype=dtype, seed=1)), expected)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("make", [tiny_config, tiny_config_51])
def test_the_config_is_the_release_s(tmp_path, make, mtp):
    # The file lists its full layers, however a config puts it.
    config = make(num_nextn_predict_layers=int(mtp)) | dict.fromkeys(SCHEDULE)
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "m.gguf", config, mtp=mtp))
    assert asdict(args_from_config(checkpoint.config)) == asdict(args_from_config(config))
    assert checkpoint.config["eos_token_id"] == [250, 251]


def indexer_types(tmp_path, layers, context):
    config = tiny_config(num_hidden_layers=layers, indexer_types=["full"] * layers)
    config["max_position_embeddings"] = context
    path = write_gguf(tmp_path / "m.gguf", config, indexer_types=False)
    return Checkpoint.open(path).config["indexer_types"]


def test_files_without_a_schedule_have_that_of_the_releases(tmp_path):
    full = indexer_types(tmp_path, 12, 1_048_576)
    assert [i for i, kind in enumerate(full) if kind == "full"] == [0, 1, 2, 6, 10]
    assert indexer_types(tmp_path, 12, 202_752) == ["full"] * 12


def test_yarn_keys(tmp_path):
    rope = {
        "rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0,
        "original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 0.7,
    }  # fmt: skip
    keys = {
        "freq_base": 1e6, "scaling.type": "yarn", "scaling.factor": 4.0,
        "scaling.original_context_length": 1024, "scaling.yarn_beta_fast": 16.0,
        "scaling.yarn_beta_slow": 2.0, "scaling.yarn_log_multiplier": 0.07,
    }  # fmt: skip
    values = {f"glm-dsa.rope.{key}": value for key, value in keys.items()}
    found = args_from_config(Checkpoint.open(write_gguf(tmp_path / "m.gguf", values=values)).config)
    assert found.rope == args_from_config(tiny_config(rope_parameters=rope)).rope


def test_names_are_those_of_the_gguf_package():
    args = args_from_config(tiny_config())
    specs = (*args.layers, *args.mtp_layers)
    every = [*modules(args), *(m for spec in specs for m in layer_modules(args, spec))]
    names = [f"{m.path}.{leaf}" for m in every for leaf in ("weight", *(m.bias or ())[:1])]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, len(specs))
    renamed = (("switch_mlp", "experts"), ("embed_q", "k_b_proj"), ("unembed_out", "v_b_proj"))
    for name in names:
        release = name.replace("e_score_correction_bias", "e_score_correction.bias")
        for ours, theirs in renamed:
            release = release.replace(ours, theirs)
        assert gguf_name(name) == known.get_name(release, (".weight", ".bias"))
        assert model_name(gguf_name(name)) == name


def test_types_have_the_sizes_of_the_gguf_package():
    for number, (name, columns, nbytes) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (columns, nbytes))


def write_shards(folder, shards, **changes):
    """The tiny model in ``shards`` files; ``changes`` are values of the last one's keys."""
    tensors = []
    write_gguf(folder / "whole.gguf", edit=lambda found: tensors.extend(found))
    (folder / "whole.gguf").unlink()
    for i in range(shards):
        part = set(tensors[i * len(tensors) // shards : (i + 1) * len(tensors) // shards])
        split = {"split.no": i, "split.count": shards, "split.tensors.count": len(tensors)}
        write_gguf(
            folder / f"m-{i + 1:05d}-of-{shards:05d}.gguf",
            values=split | (changes if i == shards - 1 else {}),
            edit=lambda found, part=part: {n: a for n, a in found.items() if n in part},
        )
    return folder / f"m-00001-of-{shards:05d}.gguf"


def test_shards(tmp_path):
    first = write_shards(tmp_path / "shards", 3)
    expected = logits_of(write_checkpoint(tmp_path / "folder"))
    assert equal(logits_of(first), expected)
    assert equal(logits_of(first.parent), expected)  # the only model in it
    second, third = (first.with_name(f"m-0000{i}-of-00003.gguf") for i in (2, 3))
    with pytest.raises(ValueError, match=r"m-00002.*'split.no' is 1, expected 0; name the first"):
        load_model(second)
    third.rename(tmp_path / "third")
    with pytest.raises(FileNotFoundError, match=r"m-00003-of-00003\.gguf is missing; m-"):
        load_model(first)
    (tmp_path / "third").rename(third)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ValueError, match=r"m-00002.*'split.no' is 2, expected 1"):
        load_model(first)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", 3, "'split.count' is 3, expected 2"),
        ("split.count", None, "'split.count' is 1, expected 2"),
        ("split.no", 0, "'split.no' is 0, expected 1"),
    ],
)
def test_shards_that_do_not_belong_together(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=f"m-00002-of-00002.gguf: key {message}"):
        load_model(write_shards(tmp_path, 2, **{key: value}))


def refused(path):
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_called_as_the_file_calls_it(tmp_path):
    path = tmp_path / "m.gguf"

    def edit(tensors):
        tensors["blk.9.attn_q_a.weight"] = tensors.pop("blk.3.attn_q_a.weight")
        del tensors["blk.1.ffn_up_exps.weight"], tensors["blk.2.exp_probs_b.bias"]
        tensors["output_norm.weight"] = tensors["output_norm.weight"][:-1]

    message = refused(write_gguf(path, edit=edit))
    assert "3 missing tensors: blk.1.ffn_up_exps.weight, blk.2.exp_probs_b.bias, blk.3." in message
    assert "1 unexpected tensor: blk.9.attn_q_a.weight." in message
    assert "output_norm.weight (m.gguf) is F32 [127], expected [128] of F32, F16, BF16" in message

    def kinds(name):
        return gguf.GGMLQuantizationType.Q4_1 if name == "blk.0.attn_q_b.weight" else None

    message = refused(write_gguf(path, types=kinds))
    assert "blk.0.attn_q_b.weight (m.gguf) is Q4_1 [384, 128], expected [384, 128] of F32,"


@pytest.mark.parametrize("experts", ["split", "joined"])
def test_experts_stream_from_the_file_itself(tmp_path, experts):
    path = write_gguf(tmp_path / "m.gguf", experts=experts)
    expected = logits_of(path)
    assert equal(logits_of(path, stream=StreamOptions(slots=3)), expected)
    pack(path, tmp_path / "sidecar")
    options = StreamOptions(slots=3, sidecar=tmp_path / "sidecar")
    assert equal(logits_of(path, stream=options), expected)


def test_a_folder_of_several_models(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    with pytest.raises(ValueError, match=r"several GGUF .*, name one of them: a\.gguf, b\.g"):
        load_model(tmp_path)
    (tmp_path / "b.gguf").unlink()
    load_model(tmp_path)


def test_a_file_that_shrinks_is_an_error_that_names_it(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    model, _ = load_model(path, lazy=True)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(RuntimeError, match=re.escape(f"{path} ends before byte")):
        mx.eval(model.parameters())
    path.unlink()
    with pytest.raises(RuntimeError, match=re.escape(f"cannot open {path}")):
        _ext.load_with_header(str(path), "{}")


def test_inspect_and_generate(capsys, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", mtp=True, shared_indexers=True)
    described = describe(path)
    assert described["ignored_tensors"]["indexer of a shared layer"] == 10
    assert described["mtp_layers"][0]["missing"] == []
    assert described["formats"]["router"]["formats"] == ["fp32"]
    assert main(["inspect", str(path)]) == 0
    assert "MTP layer   5:" in capsys.readouterr().out
    with Engine(path, tokenizer=False) as engine:
        assert engine.config["num_hidden_layers"] == 5


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    headers.prepare(folder)
    assert describe(folder / "good.gguf")["layers"] == 2
    return folder


@pytest.mark.parametrize("mutation", range(len(headers.MUTATIONS)))
def test_damaged_headers_are_refused(good, mutation):
    """With those of the other parameters, 308 files."""
    for seed in range(mutation, 22 * len(headers.MUTATIONS), len(headers.MUTATIONS)):
        with pytest.raises((ValueError, OSError)) as error:
            headers.case(seed, good)
        assert harness.clear_error(error.value), (seed, error.value)


def test_a_check_that_is_off_lets_damaged_headers_pass(good):
    with headers.planted(), pytest.raises(harness.Wrong):
        for seed in range(22 * len(headers.MUTATIONS)):
            try:
                headers.case(seed, good)
            except (ValueError, OSError):
                continue


def test_big_endian_files_and_folders_are_called_so(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "version is of big-endian numbers, expected 2 or 3" in refused(path)
    path.unlink()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(FileNotFoundError, match="has neither model"):
        load_model(path)
