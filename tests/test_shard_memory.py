"""A rank reads and keeps its part of the weights, and little else."""

from __future__ import annotations

import json
import sys

import pytest
import ring
from conftest import write_checkpoint
from test_memory import big_config

PROGRAM = ring.TESTS / "shard_memory_program.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shard", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["mlx", pytest.param("hf", marks=pytest.mark.slow)])
def test_a_rank_holds_its_share(tmp_path, layout, shard):
    """Of a pipeline one rank has two of the four layers with experts, as the other has."""
    config = big_config() | {"n_routed_experts": 48}
    write_checkpoint(tmp_path / "model", config, layout=layout)
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    for out in ring.run(2, PROGRAM, shard, tmp_path / "model", folder=tmp_path):
        found = json.loads(out.splitlines()[-1])
        print(f"{shard}, {layout}, {whole / 2**20:.1f} MiB: {found}")
        assert found["share"] < 0.53 * whole
        assert found["share"] <= found["read"] <= found["share"] + (2 << 20)  # headers, config
        assert found["memory"] <= 1.05 * found["share"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shard", [pytest.param("tensor", marks=pytest.mark.slow), "pipeline"])
def test_a_rank_that_streams_holds_its_slots(tmp_path, shard):
    config = big_config() | {"n_routed_experts": 48}
    write_checkpoint(tmp_path / "model", config, layout="mlx")
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    for out in ring.run(2, PROGRAM, shard, tmp_path / "model", "36", folder=tmp_path):
        found = json.loads(out.splitlines()[-1])
        print(f"{shard}, {whole / 2**20:.1f} MiB: {found}")
        assert 0.35 * whole < found["share"] < 0.45 * whole
        assert found["memory"] <= 1.05 * found["share"]
        assert found["highest"] <= found["planned"]
