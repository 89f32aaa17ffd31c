"""Ranks stream their rows of experts, each within its budget, with the bits of one process."""

from __future__ import annotations

import numpy as np
import pytest
import ring
import test_compressed_tensors as compressed_tensors
import test_gguf_models as gguf_models
import test_modelopt_streaming as modelopt
from conftest import tiny_config, write_checkpoint
from shard_program import bits, steps_of
from test_shards import KINDS, differing, of_ranks

from glm_fused import load_model
from glm_fused.models.config import args_from_config
from glm_fused.models.tensors import expert_modules
from glm_fused.streaming.source import LayerExperts, Part

PROGRAM = ring.TESTS / "shard_streaming_program.py"
MIX = {"ffn_down_exps": "Q8_0", "attn_": "Q6_K", "shexp": "IQ4_XS", "output": "Q8_0"}


def alone(path, mtp=False):
    """The bits that a model gives in one process, with all experts in memory."""
    model, _ = load_model(path, mtp=mtp)
    return bits(steps_of(model))


def streamed(folder, sizes, paths, ranks=2, **environment):
    """What ranks give of each model with each number of slots, by name and rank."""
    command = [PROGRAM, folder, sizes, *paths]
    ends = ring.finish(ring.start([command] * ranks, folder, **environment))
    assert [code for code, _, _ in ends] == [0] * ranks, ends
    names = [
        f"{ring.Path(str(path).partition('+')[0]).name} {size}.{rank}"
        for path in paths
        for size in sizes.split()
        for rank in range(ranks)
    ]
    return {name: dict(np.load(folder / f"{name}.npz")) for name in names}


def write_gguf(path, form=0):
    """A file of several types of blocks."""

    def kind_of(name):
        return gguf_models.Q[next((kind for part, kind in MIX.items() if part in name), "IQ2_XXS")]

    form = gguf_models.FORMS[form]
    packed, _ = gguf_models.packed_and_dense(path, gguf_models.CONFIG, kind_of, **form)
    return packed


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (2, "4,9 16"),
        pytest.param(2, " ".join(map(str, range(4, 17))), marks=pytest.mark.slow),
        pytest.param(3, "4 5,16,7 16", marks=pytest.mark.slow),
        pytest.param(4, "4 6,5,4,16", marks=pytest.mark.slow),
    ],
)
def test_bits_are_those_of_one_process_at_every_bank_size(tmp_path, ranks, sizes):
    """A layer has 16 experts, of which a token takes 4, and a prompt nearly all."""
    expected = alone("demo", mtp=True)
    for name, found in streamed(tmp_path, sizes, ["demo"], ranks, MTP="1").items():
        assert differing(found, expected) == [], name


def test_rows_of_another_rank_are_noticed(tmp_path):
    found = streamed(tmp_path, "4", ["demo"], FAULT="rows")
    expected = alone("demo")
    for name in found:
        assert len(differing(found[name], expected)) > len(expected) // 2


def check_kinds(folder, paths):
    """Compare models, in memory and streamed, with one process."""
    in_memory = of_ranks(2, folder, models=paths, mtp=False)
    found = streamed(folder, "2,5", paths)
    for i, path in enumerate(paths):
        expected = alone(path)
        every = [*in_memory[2 * i : 2 * i + 2], *(found[f"{path.name} 2,5.{r}"] for r in range(2))]
        assert [differing(each, expected) for each in every] == [[]] * 4, path


def test_gguf_and_modelopt(tmp_path):
    check_kinds(tmp_path, [write_gguf(tmp_path), modelopt.write(tmp_path / "modelopt")])


@pytest.mark.slow
def test_other_kinds_of_models(tmp_path):
    for name, (config, how) in KINDS.items():
        write_checkpoint(tmp_path / name, config, **how)
    for form in (1, 2):
        (tmp_path / f"of {form}").mkdir()
        write_gguf(tmp_path / f"of {form}", form).rename(tmp_path / f"{form}.gguf")
    check_kinds(tmp_path, [tmp_path / name for name in (*KINDS, "1.gguf", "2.gguf")])


def test_compressed_tensors(tmp_path):
    """Their biases are computed, so experts can be in memory alone."""
    path = tmp_path / "model"
    compressed_tensors.write(path, compressed_tensors.uniform(4, 64), "bfloat16")
    expected = alone(path)
    for found in of_ranks(2, tmp_path, models=[path], mtp=False):
        assert differing(found, expected) == []
    ends = ring.finish(ring.start([[PROGRAM, tmp_path, "4", path]] * 2, tmp_path))
    for code, _, errors in ends:
        assert code == 1
        assert "experts of compressed-tensors, which cannot be streamed" in errors


def test_rows_that_share_scales_are_not_cut():
    """FP8 has a scale for 128 rows."""
    args = args_from_config(tiny_config(moe_intermediate_size=256))
    modules = {
        module.path.rpartition(".")[2]: module for module in expert_modules(args, args.layers[3])
    }
    parts = Part("up_proj.weight", "U8", (256, 64)), Part("up_proj.scales", "F32", (2, 1))
    layer = LayerExperts(parts, ((0, 1000), (0, 90_000)))
    found = layer.part(modules, {"up_proj": slice(128, 256)})
    assert [part.shape for part in found.parts] == [(128, 64), (1, 1)]
    assert found.locations == ((0, 1000 + 128 * 64), (0, 90_004))
    message = r"up_proj.scales has a row for each 128 .* cannot have rows 64 to 191"
    with pytest.raises(ValueError, match=message):
        layer.part(modules, {"up_proj": slice(64, 192)})
