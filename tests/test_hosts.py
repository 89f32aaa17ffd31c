"""``glm-fused doctor --hosts``: what gathers take between machines, and what does not answer."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import pytest
import ring

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.cli import main
from glm_fused.measuring import links
from glm_fused.measuring.cluster import Link, gathers_of

HERE = "127.0.0.1,127.0.0.1"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("GLM_FUSED_NUM_THREADS", "1")


def test_it_starts_itself_on_all_hosts(capsys):
    code = main(["doctor", "--hosts", HERE, "--model", "demo", "--threads", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    sizes = {gather["name"]: gather["bytes"] for gather in found["gathers"]}
    of_model = gathers_of(Checkpoint.open("demo"))
    assert of_model == {  # 4 heads of 64, hidden 256, 4 of 64 experts and one shared, bfloat16
        "heads of attention": 512,
        "outputs": 512,
        "activations of experts": 640,
    }
    assert {name: sizes[name] for name in of_model} == of_model
    assert len(sizes) == len(of_model) + 2
    assert all(gather["microseconds"] > 0 for gather in found["gathers"])
    assert code == 0 and len(found["ranks"]) == 2
    assert found["plan"]["link"] == found["link"]
    assert found["plan"]["plans"].keys() == {"tensor", "pipeline"}
    for plan in found["plan"]["plans"].values():
        for rank, machine in zip(plan["ranks"], found["ranks"], strict=True):
            assert rank["rate"] == round(1e9 * machine["read_gb_per_s"]) > 0
            assert rank["memory"] == machine["memory"]


def test_started_by_a_launcher_rank_0_shows_what_they_found(tmp_path):
    first, second = ring.run(2, "-m", "glm_fused", "doctor", "--hosts", folder=tmp_path)
    lines = first.splitlines()
    assert [line.split()[0] for line in lines] == ["rank"] * 2 + ["gather"] * 5 + ["link"]
    assert "12.0 KiB" in lines[4] and lines[4].endswith("outputs")
    assert second == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hosts"], "--hosts: expected addresses, or to be started by mlx.launch"),
        (["--hosts", "127.0.0.1"], "--hosts: expected two addresses or more"),
        (
            ["--hosts", HERE, "--model", "/nowhere"],
            "measured nothing: [checkpoint] /nowhere does not exist",
        ),
    ],
)
def test_what_is_refused(capsys, args, message):
    assert main(["doctor", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'connect to $2: timed out' >&2; exit 255", "10.0.0.2 does not answer: connect to"),
        ("exit 255", "10.0.0.2 does not answer: ssh exits with 255"),
        ("exit 1", f"10.0.0.2 has no {sys.executable}, which runs glm-fused here"),
    ],
)
def test_a_host_that_does_not_answer_is_named(tmp_path, monkeypatch, capsys, script, message):
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\n{script}\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--hosts", "127.0.0.1,10.0.0.2"]) == 2
    assert f"[doctor] {message}" in capsys.readouterr().err


def test_a_link_by_hand():
    """Of three ranks: two hops, and two thirds of the bytes come from others."""
    found = links.link_of(3, 3_000_000, 2e-4, 2e-3 + 2e-4)
    assert found == Link(pytest.approx(1e-4), 10**9)


def test_wrong_bytes_are_noticed(monkeypatch):
    group, gather = mx.distributed.init(), mx.distributed.all_gather
    assert links._seconds(group, 100) > 0
    monkeypatch.setattr(mx.distributed, "all_gather", lambda *a, **k: gather(*a, **k) + 1)
    with pytest.raises(RuntimeError, match="other bytes came from rank 0 than it sent"):
        links._seconds(group, 100)
