"""Models with an MTP layer: from every layout, streamed, and on Metal."""

from __future__ import annotations

import os
import shutil

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from formats_under_test import assert_same_bits
from gguf_files import write_gguf
from metal_backend import cpu, metal
from test_mtp import AFFINE_4, chain, some_tokens
from test_streaming import stream

from glm_fused.generation.planning import plan_prompt
from glm_fused.loader import load_model
from glm_fused.streaming.pack import pack


def drafts_of(model):
    tokens = some_tokens(1, 25)
    _, hidden = model.states(tokens[:, :-1])
    return model.draft(tokens[:, 1:], hidden, model.make_mtp_cache())[:2]


def move_mtp(tensors):
    """The names under which oMLX keeps the MTP layer."""
    prefix, renamed = "model.layers.5.", {}
    for name, array in tensors.items():
        rest = name.removeprefix(prefix)
        if rest == name:
            renamed[name] = array
        elif rest.startswith(("eh_proj", "enorm", "hnorm")):
            renamed[f"mtp.0.{rest}"] = array
        elif rest.startswith("shared_head."):
            renamed[f"mtp.0.{rest.removeprefix('shared_head.')}"] = array
        else:
            renamed[f"mtp.0.block.{rest}"] = array
    return renamed


def copies(tensors):
    """What DeepSeek's releases have: embedding and head once more, which nothing reads."""
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"model.layers.5.{name}.weight"] = mx.zeros_like(tensors["lm_head.weight"])


LAYOUTS = {
    "hf-fused": {"layout": "hf-fused"},
    "mlx": {"layout": "mlx"},
    "oMLX": {"layout": "mlx", "edit": move_mtp},
    "oMLX, an expert a tensor": {"layout": "hf", "edit": move_mtp},
    "copies": {"layout": "hf", "edit": copies},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_give_the_same_drafts(tmp_path, options):
    release = write_checkpoint(tmp_path / "release", layout="hf", mtp=True)
    other = write_checkpoint(tmp_path / "other", mtp=True, **options)
    for found, expected in zip(
        *(drafts_of(load_model(path, mtp=True)[0]) for path in (other, release)), strict=True
    ):
        assert_same_bits(found, expected)


def test_overrides_under_other_names(tmp_path):
    """What a config says of modules, it may say under the names that the tensors have."""
    override = {"group_size": 64, "bits": 8, "mode": "affine"}
    module = "eh_proj", "self_attn.o_proj"
    quantization = AFFINE_4 | {f"model.layers.5.{name}": override for name in module}
    release = write_checkpoint(tmp_path / "a", quantization=quantization, mtp=True)
    other = write_checkpoint(tmp_path / "b", quantization=quantization, mtp=True, edit=move_mtp)
    config = (other / "config.json").read_text()
    config = config.replace("model.layers.5.eh_proj", "mtp.0.eh_proj")
    config = config.replace("model.layers.5.self_attn", "mtp.0.block.self_attn")
    (other / "config.json").write_text(config)
    first, second = (load_model(path, mtp=True)[0] for path in (release, other))
    assert (first.model.mtp.eh_proj.bits, second.model.mtp.eh_proj.bits) == (8, 8)
    for found, expected in zip(drafts_of(first), drafts_of(second), strict=True):
        assert_same_bits(found, expected)


def test_the_decoder_is_the_same_with_and_without(tmp_path):
    """The layer is no layer of the decoder: not for mlx-lm, nor in caches or logits."""
    path = write_checkpoint(tmp_path, mtp=True, quantization=AFFINE_4)
    plain, model = load_model(path)[0], load_model(path, mtp=True)[0]
    assert len(model.layers) == len(model.make_cache()) == len(plain.layers) == 5
    assert model.args.has_mtp and not plain.args.has_mtp
    tokens = some_tokens(1, 20)
    assert_same_bits(model(tokens, model.make_cache()), plain(tokens, plain.make_cache()))


def rounds(model):
    """What rounds of drafts give: after a prompt in chunks, three drafts and their verification."""
    cache, drafts, found = model.make_cache(), model.make_mtp_cache(), []
    tokens = some_tokens(1, 25)
    logits, hidden = model.states(tokens[:, :20], cache)
    model.draft(tokens[:, 1:21], hidden, drafts)
    mx.eval([layer.state for layer in (*cache, drafts)])
    logits, hidden = model.states(tokens[:, 20:], cache)
    known = mx.concatenate([tokens[:, 21:], mx.argmax(logits[:, -1:], axis=-1)], axis=1)
    found += chain(model, known, hidden, drafts, 3)
    found += model.states(tokens[:, :4], cache)
    mx.eval(found)
    return found


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mtp")
    return write_checkpoint(path, quantization=AFFINE_4, mtp=True, shards=3)


@pytest.fixture(scope="module")
def expected(folder):
    with cpu():
        return rounds(load_model(folder, mtp=True)[0])


@pytest.fixture(scope="module")
def sidecar(folder):
    pack(folder, folder / "sidecar")
    return folder / "sidecar"


@pytest.mark.parametrize("options", [{}, {"spares": 1}, {"direct": True}], ids=str)
@pytest.mark.parametrize(("slots", "packed"), [(3, True), (8, False)])
def test_streamed_experts_give_the_same_bits(folder, sidecar, expected, slots, packed, options):
    """Those of the MTP layer are streamed like all others, from the checkpoint itself."""
    options = options | {"sidecar": sidecar if packed else None}
    model, _ = load_model(folder, stream=stream(slots, **options), mtp=True)
    assert_same(rounds(model), expected)
    assert model.streaming.banks.keys() == {1, 2, 3, 4, 5}
    assert model.streaming.banks[5].stats()["misses"] > 0
    assert len(model.streaming.plan.layers) == 5


def test_a_failed_read_of_a_draft_raises(folder, tmp_path):
    """It raises where the draft is evaluated, and its cache is of no use afterwards."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    model, _ = load_model(broken, stream=stream(3), mtp=True)
    tokens = some_tokens(1, 9)
    _, hidden = model.states(tokens[:, :-1], model.make_cache())
    mx.eval(hidden)
    for file in broken.glob("*.safetensors"):
        os.truncate(file, 1000)
    cache = model.make_mtp_cache()
    with pytest.raises(RuntimeError, match=r"ends before|layer 5"):
        mx.eval(model.draft(tokens[:, 1:], hidden, cache)[:2])
    with pytest.raises(RuntimeError, match="this cache is of no use"):
        model.draft(tokens[:, :1], hidden[:, :1], cache)
    cache = model.make_cache()
    with pytest.raises(RuntimeError):
        mx.eval(model.states(tokens, cache))


@pytest.mark.slow
def test_metal_gives_the_same_bits(folder, expected):
    with metal():
        model, _ = load_model(folder, mtp=True)
        assert_same(rounds(model), expected)


def test_a_gguf_file_has_it_too(tmp_path):
    """The file's layer is the release's; what it does not say, it does as the release."""
    config = tiny_config()
    release = write_checkpoint(tmp_path / "release", config, layout="hf", mtp=True)
    path = write_gguf(tmp_path / "m.gguf", config, mtp=True)
    model, plain = load_model(path, mtp=True)[0], load_model(release, mtp=True)[0]
    assert_same(drafts_of(model), drafts_of(plain))
    assert model.args.index_share_for_mtp_iteration


def test_memory_has_room_for_the_layer_and_its_cache(folder):
    plain, model = load_model(folder)[0], load_model(folder, mtp=True)[0]
    without, with_it = plan_prompt(plain, 1000), plan_prompt(model, 1000)
    assert with_it.weights > without.weights
    rows = 2 * (128 + 32 + 64)  # latents, RoPE keys, indexer keys
    assert with_it.cache - without.cache >= 1000 * rows
