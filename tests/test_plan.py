"""``glm-fused plan``: its sums, against the model that ranks load, and by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mlx.utils import tree_flatten

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.cli import main
from glm_fused.loader import open_model
from glm_fused.measuring.cluster import Link, Machine, plan

MACHINE, LINK = Machine(8 << 30, 10**9), Link(1e-3, 10**6)


def planned(count, context=100, kv_format="auto", link=LINK):
    return plan(Checkpoint.open("demo"), [MACHINE] * count, link, context, kv_format)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_are_those_that_a_rank_loads(count):
    ranks = None if count == 1 else SimpleNamespace(rank=0, size=count)
    model = open_model("demo", "auto", None, ranks=ranks).model
    loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    biases_and_norms = 0.01 * loaded  # which the inventory counts with their modules
    for rank in planned(count)["ranks"]:
        assert abs(rank["weights"] - loaded) <= biases_and_norms


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


def test_what_changes_the_sums():
    alone, four = planned(1), planned(4)
    assert alone["gathers"] == {"count": 0, "bytes": 0, "ms": 0.0}
    assert four["ranks"][0]["weights"] < 0.5 * alone["ranks"][0]["weights"]
    assert planned(1, context=64)["ranks"][0]["cache_read"] == 7 * 64 * 2 * (128 + 32)
    fp8 = planned(1, kv_format="fp8")
    assert (fp8["kv_format"], alone["kv_format"]) == ("fp8", "bf16")
    assert fp8["ranks"][0]["cache_read"] < alone["ranks"][0]["cache_read"]
    with pytest.raises(ValueError, match="not enough for 5 ranks"):
        planned(5)


def test_the_command(capsys):
    machine = ["--machine", "1GB,20GB/s"]
    code = main(["plan", "--model", "demo", *machine, *machine, "--link", "200us,1GB/s", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["fits"], len(found["ranks"])) == (0, True, 2)
    assert found["link"] == {"latency": pytest.approx(2e-4), "rate": 10**9}
    assert main(["plan", "--model", "demo", "--machine", "10MB,20GB/s"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "gathers" not in out


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
