"""Ranks that have some layers each stream their experts, with the bits of one process."""

from __future__ import annotations

import shutil

import pipeline_program
import pytest
from conftest import tiny_config, tiny_config_51, write_checkpoint
from gguf_files import gguf_tensors
from test_flashmoe import export, is_expert, write_gguf
from test_pipeline import differing
from test_shard_streaming import alone as of_rows
from test_shard_streaming import streamed
from test_shards import differing as of_rows_differing

from glm_fused import load_model
from glm_fused.checkpoint.checked import checked
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.models.line import Place
from glm_fused.models.pipeline import Stage
from glm_fused.models.shard import Sharding
from glm_fused.streaming.banks import find_source
from glm_fused.streaming.pack import pack
from glm_fused.streaming.sidecar import Sidecar, layer_file
from glm_fused.streaming.source import ExpertReader

FORMATS = ("bf16", "fp8")
WHICH = {"SHARD": "pipeline", "FORMATS": " ".join(FORMATS)}


def alone(path, mtp=True):
    """The bits that a model gives in one process, with all experts in memory."""
    model, _ = load_model(path, mtp=mtp)
    return pipeline_program.steps_of(model, FORMATS)


def differences(folder, sizes, expected, ranks=2, **environment):
    """The steps that differ from one process, by name, of models and what each is to give."""
    found = streamed(folder, sizes, list(expected), ranks, **WHICH, **environment)
    names = {str(model).partition("+")[0].rpartition("/")[2]: model for model in expected}
    return {
        name: differing(steps, expected[names[name.rsplit(" ", 1)[0]]], int(name[-1]))
        for name, steps in found.items()
    }


def test_bits_are_those_of_one_process_and_experts_of_another_rank_are_noticed(tmp_path):
    """With a sidecar, of which each rank has the files of its own layers, and not that of MTP."""
    model, faulty = tmp_path / "packed", tmp_path / "faulty"
    write_checkpoint(model, tiny_config(), mtp=True)
    faulty.symlink_to(model)
    pack(model, tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for rank, others in enumerate(((3, 4), (1, 2))):
        for layer in others:
            (tmp_path / str(rank) / layer_file(layer)).unlink()
    right = alone(model)
    expected = {"demo": alone("demo"), f"{model}+{tmp_path}/RANK": right, faulty: right}
    found = differences(tmp_path, "4,8", expected, FAULT="layers", MTP="1")
    noticed = [found.pop(f"faulty 4,8.{rank}") for rank in range(2)]
    assert found == {f"{name} 4,8.{rank}": [] for name in ("demo", "packed") for rank in range(2)}
    for rank, steps in enumerate(noticed):
        assert len(steps) == len([step for step in right if rank == 0 or "draft" not in step])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "sizes"), [(2, " ".join(map(str, range(4, 17)))), (3, "4 5,16,7 16")]
)
def test_every_bank_size(tmp_path, ranks, sizes):
    found = differences(tmp_path, sizes, {"demo": alone("demo")}, ranks, MTP="1")
    assert not any(found.values())


@pytest.mark.slow
def test_four_ranks_of_which_one_has_no_experts(tmp_path):
    """The first has a dense layer alone."""
    model = tmp_path / "5.1"
    write_checkpoint(model, tiny_config_51(num_hidden_layers=4))
    found = differences(tmp_path, "2 5,3", {model: alone(model, mtp=False)}, 4)
    assert not any(found.values())


@pytest.mark.slow
def test_flashmoe(tmp_path):
    drawn = gguf_tensors(tiny_config())
    whole = write_gguf(tmp_path / "whole.gguf", edit=lambda _: drawn)
    rest = {name: values for name, values in drawn.items() if not is_expert(name)}
    dense = write_gguf(tmp_path / "dense.gguf", edit=lambda _: rest)
    flashmoe = export(tmp_path / "flashmoe", drawn)
    model = f"{dense}+{flashmoe}"
    found = differences(tmp_path, "2,5", {model: alone(whole, mtp=False)})
    assert not any(found.values())
    in_rows, right = streamed(tmp_path, "2,5", [model]), of_rows(whole)
    assert [of_rows_differing(each, right) for each in in_rows.values()] == [[], []]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A checkpoint and its sidecar."""
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(folder / "model", tiny_config())
    pack(folder / "model", folder / "sidecar")
    return folder


def test_rows_of_experts_with_checksums_are_refused(packed):
    """A part of an expert has none."""
    checkpoint = Checkpoint.open(packed / "model")
    args, inventory = checked(checkpoint)
    sharding = Sharding.of(args, inventory.formats, Place(0, 2))
    message = (
        r"\[shard\] sidecar .* has checksums of whole experts, .* expected ranks that have lay"
    )
    with pytest.raises(ValueError, match=message):
        find_source(checkpoint, args, packed / "sidecar", sharding)
    stage = Stage.of(args, inventory.loaded_bytes, Place(1, 2))
    assert list(find_source(checkpoint, args, packed / "sidecar", stage).layers) == [3, 4]


def test_some_layers_of_a_source_lie_where_they_did(packed):
    source = Sidecar.open(packed / "sidecar").source()
    some = source.of_layers({2, 4})
    assert [path.name for path in some.files] == ["layer_002.bin", "layer_004.bin"]
    assert list(some.layers) == [2, 4]
    with ExpertReader(source) as every, ExpertReader(some) as ours:
        for i, layer in some.layers.items():
            assert layer.checksums == source.layers[i].checksums
            for expert in range(layer.experts):
                assert ours.expert(layer, expert) == every.expert(source.layers[i], expert)
