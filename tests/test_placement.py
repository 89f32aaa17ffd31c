"""Whether ranks share a model by rows or by layers, as links and memory have it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import ring
from conftest import tiny_config, write_checkpoint

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.paths import checkpoint_path
from glm_fused.generation.planning import SHARE
from glm_fused.measuring import cluster, placement
from glm_fused.measuring.cluster import Link, Machine, plan
from glm_fused.measuring.placement import plan_pipeline, plan_shards
from glm_fused.streaming.pack import pack

FAST, SLOW = Link(1e-9, 100 * 10**9), Link(1e-3, 10**8)
MACHINES = [Machine(10**9, 10**6), Machine(10**9, 10**6)]  # so slow that reading counts
GENERATE = ["-m", "glm_fused", "generate", "--model", "demo", "--raw", "--prompt", "def main():"]


@pytest.fixture(scope="module")
def demo():
    return Checkpoint.open(checkpoint_path("demo"))


def test_a_slow_link_wants_layers_and_a_fast_one_rows(demo):
    quick = [Machine(10**9, 10**9)] * 2
    assert plan_shards(demo, MACHINES, FAST, 1024, "auto")["shard"] == "tensor"
    found = plan_shards(demo, quick, SLOW, 1024, "auto")
    assert found["shard"] == "pipeline"
    numbers = r"a link of 1000 µs and 0.10 GB/s: tensor [\d.]+ ms .*; pipeline [\d.]+ ms .* least"
    assert re.fullmatch(numbers, found["reason"])
    assert plan_shards(demo, quick, SLOW, 1024, "auto", ["tensor"])["shard"] == "tensor"


def test_layers_cost_what_all_of_the_model_does(demo):
    """Ranks read one after the other what one machine reads, and send four messages of three."""
    one = plan(demo, MACHINES[:1], FAST, 1024, "auto")["ranks"][0]
    found = plan_pipeline(demo, [MACHINES[0]] * 3, SLOW, 1024, "auto")
    assert found["messages"] == {"count": 4, "bytes": 4 * 512, "ms": 4 * (1 + 512 / 1e5)}
    for key, head in (("cache_read", 0), ("weights_read", 2)):
        total = sum(rank[key] for rank in found["ranks"])
        heads = head * 2048 * (256 * 6 // 8 + 4 * 4)  # which each rank has: codes, scales, biases
        assert abs(total - heads - one[key]) <= 3


def test_texts_together_wait_for_the_slowest_machine_or_the_link(demo):
    def together(link):
        found = plan_pipeline(demo, MACHINES, link, 1024, "auto")
        assert found["together"]["texts"] == 2
        return 1e3 / found["together"]["tokens_per_second"], found

    between, found = together(FAST)
    assert between == pytest.approx(max(rank["read_ms"] for rank in found["ranks"]))
    between, found = together(Link(10.0, 10**8))
    assert between == pytest.approx(found["ms_per_token"] / 2)


def test_what_does_not_fit_is_not_taken(demo):
    """Each of several ranks with rows has the whole cache, one with layers that of its layers."""
    how = FAST, 8192, "auto"
    by_rows, by_layers = (
        max(rank["needed"] for rank in planned(demo, MACHINES, *how)["ranks"])
        for planned in (plan, plan_pipeline)
    )
    assert by_layers < by_rows
    between = [Machine(round((by_rows + by_layers) / 2 / SHARE), 10**6)] * 2
    assert plan_shards(demo, MACHINES, *how)["shard"] == "tensor"
    found = plan_shards(demo, between, *how)
    assert (found["shard"], found["fits"]) == ("pipeline", True)
    assert found["reason"].count("does not fit") == 1


def test_what_cannot_be_split_is_not_taken(tmp_path):
    """A single head is for one rank; nine ranks are too many for any way."""
    write_checkpoint(tmp_path, tiny_config(num_attention_heads=1))
    found = plan_shards(Checkpoint.open(tmp_path), MACHINES, FAST, 64, "auto")
    assert found["shard"] == "pipeline"
    assert found["refused"].keys() == {"tensor"}
    assert "not enough for 2 ranks" in found["reason"]
    with pytest.raises(ValueError, match=r"\[shard\] .* not enough for 9 ranks"):
        plan_shards(Checkpoint.open(tmp_path), MACHINES[:1] * 9, FAST, 64, "auto")


def test_streamed_experts_are_read_from_disks(demo, monkeypatch):
    """Rows read them at the same time, which even a slow link is worth, and few have to fit."""
    for module in (cluster, placement):  # beside a small model's experts a prompt's chunk is large
        monkeypatch.setattr(module, "SHARED_STEP", 1)
    how = SLOW, 1024, "auto"
    quick = {disk: Machine(10**9, 10**9, disk) for disk in (None, 10**6)}
    whole, few = (
        max(rank["needed"] for rank in plan(demo, [machine] * 2, *how)["ranks"])
        for machine in quick.values()
    )
    assert few < whole
    between = [
        replace(machine, memory=round((whole + few) / 2 / SHARE)) for machine in quick.values()
    ]
    assert not plan(demo, between[:1] * 2, *how)["fits"]
    found = plan_shards(demo, between[1:] * 2, *how)
    assert found["shard"] == "tensor"
    assert "does not fit" not in found["reason"]
    assert found["reason"].endswith("; experts are read from disks")


def test_ranks_measure_and_say_what_they_take(tmp_path):
    command = [*GENERATE, "--max-tokens", "4", "--shard", "auto", "--slots", "8"]
    (code, text, said), (other, nothing, silent) = ring.finish(ring.start([command] * 2, tmp_path))
    assert (code, other, nothing) == (0, 0, "")
    assert text
    link = r"^--shard (tensor|pipeline): a link of \d+ µs and [\d.]+ GB/s: .* read from disks$"
    assert re.search(link, said, re.M)
    assert "--shard" not in silent


@pytest.mark.slow
def test_what_rows_lack_takes_layers_whatever_the_link(tmp_path):
    pack(checkpoint_path("demo"), tmp_path / "sidecar")
    command = [*GENERATE, "--max-tokens", "2", "--shard", "auto", "--sidecar", tmp_path / "sidecar"]
    (code, _, said), (other, _, _) = ring.finish(ring.start([command] * 2, tmp_path))
    assert (code, other) == (0, 0)
    assert "--shard pipeline: --sidecar not with tensor\n" in said
