"""``glm-fused selftest --measure`` runs every part, on the CPU and with the launchers of Metal."""

import json

import mlx.core as mx
import pytest
from metal_backend import GPU, simulated_only
from test_cli import run

from glm_fused import _ext
from glm_fused.cli import selftest
from glm_fused.measuring import experts, measure, steps, subject, sweep
from glm_fused.measuring.subject import KINDS, SIZES, Subject, on
from glm_fused.selftest.backends import CPU, METAL, SIMULATED

SMALL, MEMORY = SIZES["small"], 8 << 30
ON_METAL = METAL if GPU else SIMULATED[0]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(experts, "bandwidth", lambda size: small_bandwidth(size, 1 << 20))


small_bandwidth = experts.bandwidth


def quiet(_):
    pass


def measured(backend, *parts):
    return measure.measure(backend, "small", MEMORY, parts, quiet)


def test_the_command_measures_on_the_cpu(capsys):
    command = ("selftest", "--backend", "cpu", "--measure", "small")
    code, out, err = run(capsys, *command, "--json", "-")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["ok"] and document["machine"]["chip"]
    (found,) = document["measured"]
    assert (found["backend"], found["size"], found["experts"]) == ("cpu", "small", 16)
    assert set(measure.PARTS) < set(found)
    for part in measure.PARTS:
        assert "error" not in found[part], found[part]
    assert {row["context"] for row in found["stages"]} == set(SMALL.contexts)
    assert [row["layer"] for row in found["layers"]] == list(KINDS)
    assert found["last_slot"] == {"slots": 256, "same_bits": True}
    hits, reads = found["streaming"]
    expert = 3 * 256 * 128 * 9 / 16 / 1e6  # MB in four bits, with a scale and a bias per 64
    assert hits["mb"] < 1.2 * 8 * expert / 7 + 0.01
    assert reads["mb"] == pytest.approx(8 * expert, rel=0.01)
    (row,) = found["sweep"]
    assert row["settings"] == {} and row["us"] > 0
    assert all(row["us"] > 0 for part in ("stages", "layers") for row in found[part])
    assert 0 < found["token"]["us"] <= found["token"]["of_glm_us"]
    assert found["kernels"] == [] or not GPU


def test_the_command_prints_text_and_writes_reports(capsys, tmp_path):
    file = tmp_path / "report.json"
    command = ("selftest", "--backend", "cpu", "--measure", "small", "--parts", "last_slot,prompts")
    code, out, _ = run(capsys, *command, "--json", file)
    assert code == 0
    assert "last_slot\n  slots 256, same_bits True" in out
    assert out.count("tokens ") == len(SMALL.prompts)
    assert "stages" not in out
    (found,) = json.loads(file.read_text())["measured"]
    assert [row["tokens"] for row in found["prompts"]] == list(SMALL.prompts)


def test_unknown_parts_and_sizes(capsys):
    code, _, err = run(capsys, "selftest", "--measure", "small", "--parts", "token,more")
    assert code == 2 and "no part is named 'more'" in err
    code, _, err = run(capsys, "selftest", "--measure", "huge")
    assert code == 2 and "huge" in err


def test_the_command_knows_the_parts_and_sizes():
    """It lists them itself, so that --help imports nothing of what measures."""
    assert (measure.PARTS, tuple(SIZES)) == (selftest.PARTS, selftest.SIZES)


def test_layers_on_metal_say_what_they_launch():
    found = measured(ON_METAL, "layers", "token", "last_slot")
    for row in (*found["layers"], found["token"]):
        assert "error" not in row, row
    launches = [row["launches"] for row in found["layers"]]
    # The counts that test_metal_launches.py holds, without MLX's own.
    assert launches == [12, 14, 11] or GPU
    assert found["token"]["launches"] >= sum(launches)
    assert found["last_slot"]["same_bits"]
    names = {kernel["kernel"].partition("<")[0] for kernel in found["kernels"]}
    assert {"project", "moe_gate_up", "mla_split", "index_select"} <= names
    for kernel in found["kernels"]:
        assert 32 <= kernel["most_threads"] <= 1024
        assert kernel["seconds"] >= 0 and kernel["threadgroup_bytes"] >= 0


@pytest.mark.slow
@simulated_only
def test_stages_prompts_and_streaming_run_on_metal():
    found = measured(ON_METAL, "stages", "prompts", "streaming", "bandwidth")
    for part in ("stages", "prompts", "streaming", "bandwidth"):
        assert "error" not in found[part], found[part]


def test_a_sweep_sets_the_variables(monkeypatch):
    seen = []

    def ran(command, env, **_):
        seen.append((command, env))
        text = json.dumps({"measured": [{"token": {"us": 1.0}}]})
        return sweep.subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(sweep.subprocess, "run", ran)
    rows = sweep.sweep(METAL, "small", quiet)
    assert [row["settings"] for row in rows] == sweep.settings()
    assert rows[0]["settings"] == {}
    for (command, env), row in zip(seen, rows, strict=True):
        assert row["us"] == 1.0
        assert command[-4:-2] == ["--parts", "token"]
        for name, value in row["settings"].items():
            assert env[name] == value


def test_a_sweep_whose_process_fails_says_so():
    (row,) = sweep.sweep(CPU, "small", quiet, [{"GLM_FUSED_KERNELS": "none"}])
    assert "GLM_FUSED_KERNELS" in row["error"]


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    def fail(_):
        raise RuntimeError("/home/me/x.metal: bad")

    monkeypatch.setattr(steps, "layer_rows", fail)
    found = measured(CPU, "layers", "last_slot")
    assert found["layers"] == {"error": "x.metal: bad"}
    assert found["last_slot"]["same_bits"]


def test_a_wrong_slot_is_told(monkeypatch):
    right = experts._as_last
    monkeypatch.setattr(experts, "_as_last", lambda w: right(w)._replace(
        planes=[mx.roll(plane, 1, axis=0) for plane in right(w).planes]
    ))  # fmt: skip
    assert measured(CPU, "last_slot")["last_slot"]["same_bits"] is False


def test_memory_says_how_many_experts_there_are():
    size = SIZES["glm-5.2"]
    assert size.experts_in(64 << 30) == 256
    assert size.experts_in(16 << 30) == 64
    args = subject.ModelArgs.from_dict(size.config | subject._LAYERS)
    assert (args.hidden_size, args.moe_intermediate_size, args.index_topk) == (6144, 2048, 2048)
    assert sum(KINDS.values()) == 78


def test_backends_are_left_as_they_were():
    before = mx.default_device()
    with on(CPU):
        assert mx.default_device() == mx.cpu
    assert mx.default_device() == before
    assert Subject(SMALL, 16).args.n_routed_experts == 16
    assert _ext.take_metal_launches() >= 0
