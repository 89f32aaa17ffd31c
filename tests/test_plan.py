"""``glm-fused plan``: its sums, against the model that ranks load, and by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mlx.utils import tree_flatten

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.cli import main
from glm_fused.generation.planning import plan_prompt
from glm_fused.loader import open_model
from glm_fused.measuring.cluster import Link, Machine, plan
from glm_fused.models.config import args_from_config
from glm_fused.models.sharded_indexer import keys_pay

MACHINE, LINK = Machine(8 << 30, 10**9), Link(1e-3, 10**6)


def planned(count, context=100, kv_format="auto", link=LINK):
    return plan(Checkpoint.open("demo"), [MACHINE] * count, link, context, kv_format)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_memory_is_what_a_rank_needs(count):
    """Of ranks that take as many tokens of a prompt at a time as they do by themselves."""
    ranks, step = (None, 32) if count == 1 else (SimpleNamespace(rank=0, size=count), 512)
    model = open_model("demo", "auto", None, step, ranks=ranks).model
    loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    biases_and_norms = 0.01 * loaded  # which the inventory counts with their modules
    held = plan_prompt(model, 600)
    for rank in planned(count, 600)["ranks"]:
        assert abs(rank["weights"] - loaded) <= biases_and_norms
        assert rank["chunk"] == {"tokens": step, "bytes": held.temporaries}
        assert rank["cache"] == held.cache
        assert rank["needed"] == rank["weights"] + held.cache + held.temporaries


def test_sums_by_hand():
    """The bundled model has 7 layers, 3 of them full; hidden 256, 4 heads of 64, bfloat16."""
    found = planned(2)
    values = 7 * (4 * 64 + 2 * 256) + 512 + 6 * 5 * 64 + 2 * 256 + 2048
    assert found["gathers"]["count"] == 30
    assert found["gathers"]["bytes"] == 2 * values
    assert found["gathers"]["ms"] == pytest.approx(30 + 1e3 * values / 10**6)
    (rank, other) = found["ranks"]
    assert rank == other
    assert rank["cache_read"] == 7 * 64 * 2 * (128 + 32) + 3 * 100 * 2 * 64
    read = rank["weights_read"] + rank["cache_read"]
    assert rank["read_ms"] == pytest.approx(read / 1e6)
    assert found["ms_per_token"] == pytest.approx(rank["read_ms"] + found["gathers"]["ms"])


def test_scores_that_are_shared_out_are_one_more_gather_of_each_full_layer():
    """3 of them; each rank reads its keys, and those that both have chosen: 64 each."""
    args = args_from_config(Checkpoint.open("demo").config)
    sizes = args.index_topk, args.index_n_heads * args.index_head_dim, 2
    most = next(total for total in range(64, 1 << 20) if keys_pay(1, total, *sizes)) - 1
    before, after = planned(2, most), planned(2, most + 1)
    assert after["gathers"]["count"] == before["gathers"]["count"] + 3
    assert after["gathers"]["bytes"] == before["gathers"]["bytes"] + 3 * 4 * 2 * 64
    chosen = 7 * 64 * 2 * (128 + 32)
    assert before["ranks"][0]["cache_read"] == chosen + 3 * most * 2 * 64
    assert after["ranks"][0]["cache_read"] == chosen + 3 * ((most + 2) // 2 + 128) * 2 * 64
    assert planned(1, most + 1)["gathers"]["count"] == 0


def test_what_changes_the_sums():
    alone, four = planned(1), planned(4)
    assert alone["gathers"] == {"count": 0, "bytes": 0, "ms": 0.0}
    assert four["ranks"][0]["weights"] < 0.5 * alone["ranks"][0]["weights"]
    assert planned(1, context=64)["ranks"][0]["cache_read"] == 7 * 64 * 2 * (128 + 32)
    fp8 = planned(1, kv_format="fp8")
    assert fp8["ranks"][0]["cache_read"] < alone["ranks"][0]["cache_read"]
    with pytest.raises(ValueError, match="not enough for 5 ranks"):
        planned(5)


def test_the_command(capsys):
    machine = ["--machine", "1GB,20GB/s"]
    code = main(["plan", "--model", "demo", *machine, *machine, "--link", "200us,1GB/s", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["fits"], found["kv_format"]) == (0, True, "bf16")
    assert {way: len(of_way["ranks"]) for way, of_way in found["plans"].items()} == {
        "tensor": 2,
        "pipeline": 2,
    }
    assert found["ms_per_token"] == found["plans"][found["shard"]]["ms_per_token"]
    assert found["link"] == {"latency": pytest.approx(2e-4), "rate": 10**9}
    assert main(["plan", "--model", "demo", *machine, *machine, "--link", "9ms,1GB/s"]) == 0
    out = capsys.readouterr().out
    assert "\npipeline is best: a link of 9000 µs and 1.00 GB/s: tensor 27" in out
    assert "  gathers   30 a token" in out and "  messages  2 a token" in out
    assert main(["plan", "--model", "demo", *machine, *machine, "--shard", "tensor"]) == 0
    out = capsys.readouterr().out
    assert "gathers" in out and "messages" not in out and "best" not in out
    assert main(["plan", "--model", "demo", "--machine", "10MB,20GB/s"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "gathers" not in out and "--shard" not in out
    assert main(["plan", "--model", "demo", *machine, "--shard", "pipeline"]) == 2
    assert "--shard: expected two machines or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--machine", "8GB"], ["--machine", "8,1GB/s"], ["--machine", "8GB,0B/s"]]
    + [["--machine", "8GB,1GB/s", "--link", link] for link in ("50,1GB/s", "us,1GB/s", "99s,1GB")],
)
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plan", "--model", "demo", *wrong])
    assert exit.value.code == 2
    assert "expected one such as" in capsys.readouterr().err
