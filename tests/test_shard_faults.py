"""Files of one rank that are damaged end all ranks, with its error."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import ring

from glm_fused import Engine
from glm_fused.checkpoint.paths import DEMO, checkpoint_path

GENERATE = ["-m", "glm_fused", "generate", "--raw", "--prompt", "def main():", "--shard", "tensor"]
FILE = "model.safetensors"


def copy(folder):
    """A copy of the bundled model."""
    return shutil.copytree(checkpoint_path(DEMO), folder)


def commands(*models, more=()):
    """Each rank's command, with a model of its own."""
    return [[*GENERATE, "--model", model, *more] for model in models]


def check_ends(ends, *says):
    """All ranks failed, and said why."""
    for code, _, errors in ends:
        assert code == 2, ends
        (last,) = [line for line in errors.splitlines() if line.startswith("glm-fused: error: ")]
        assert all(text in last for text in says), ends


def test_a_file_that_is_cut_off(tmp_path):
    whole, cut = copy(tmp_path / "whole"), copy(tmp_path / "cut")
    size = (cut / FILE).stat().st_size
    os.truncate(cut / FILE, size - 1000)
    ends = ring.finish(ring.start(commands(whole, cut), tmp_path))
    check_ends(ends, str(cut / FILE), f"{size - 1000} bytes")


def test_a_scale_that_is_no_number_in_one_ranks_rows(tmp_path):
    """Rank 0 reads other rows of the same file."""
    model = copy(tmp_path / "model")
    with open(model / FILE, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        _, end = json.loads(file.read(length))["lm_head.scales"]["data_offsets"]
        file.seek(8 + length + end - 2)
        file.write(b"\xff\x7f")  # a NaN of bfloat16
    ends = ring.finish(ring.start(commands(model, model), tmp_path))
    assert "rank 1 failed" in ends[0][2]
    check_ends(ends, "lm_head.scales has nan")


@pytest.mark.parametrize("shard", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_a_disk_that_fails_while_experts_are_streamed(tmp_path, shard):
    """Nobody chooses a token from what was not read."""
    models = copy(tmp_path / "0"), copy(tmp_path / "1")
    more = ["--slots", "4", "--max-tokens", "4000", "--seed", "1", "--shard", shard]
    ranks = ring.start(commands(*models, more=more), tmp_path)
    first = os.read(ranks[0].stdout.fileno(), 1).decode()  # nothing is left in a buffer
    os.truncate(models[1] / FILE, 100_000)
    ends = ring.finish(ranks)
    assert "rank 1 failed" in ends[0][2]
    check_ends(ends, "[slots] layer ", str(models[1] / FILE))
    text = first + ends[0][1]
    with Engine("demo") as engine:
        expected = engine.generate("def main():", raw=True, seed=1, max_tokens=len(text) + 8)
    assert expected.text.startswith(text)
