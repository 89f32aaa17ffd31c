"""Replaying traces: what a bank would have done, beside Belady's optimum."""

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm_fused import _ext
from glm_fused.cli import main
from glm_fused.replay import read_trace, replay

TRACES = Path(__file__).parent / "vectors" / "traces"

HEADER = '{"experts": 8, "top_k": 2, "expert_bytes": {"1": 10}}\n'
REQUESTS = "".join(f'{{"layer": 1, "experts": [[{i % 5}, {i % 3 + 5}]]}}\n' for i in range(40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        (HEADER, "has no requests"),
        ("[1]\n", r"line 1: .* expected the header"),
        (HEADER + "{\n", r"line 2: .* expected the request"),
        (HEADER + '{"layer": 1}\n', r"line 2: .* expected the request"),
        (HEADER + '{"layer": 3, "experts": [[1, 2]]}\n', "layer or expert the model lacks"),
        (HEADER + '{"layer": 1, "experts": [[1, 8]]}\n', "layer or expert the model lacks"),
        ("\udcff", "is not text"),
        (None, "No such file or directory, expected a trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_trace(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bank", "0"], "a bank of 0 slots, expected 2 to 8: a token needs 2."),
        (["--bank", "9"], "a bank of 9 slots, expected 2 to 8: a token needs 2."),
        (["--bank", "many"], "--bank: expected numbers of slots, found 'many'."),
        (["--policy", "fifo"], "'fifo', expected some of learned, lru, s3fifo, pinned."),
        (["--read-rate", "0"], "--read-rate: expected bytes a second, found '0'."),
    ],
)
def test_a_replay_says_what_is_wrong(tmp_path, capsys, options, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + REQUESTS)
    assert main(["replay", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("glm-fused: error: ")
    assert error.endswith(message + "\n")
    assert error.count("\n") == 1


def test_a_replay_takes_parts_of_the_experts(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + REQUESTS)
    assert main(["replay", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 40
    assert {row["slots"] for row in result["rows"]} == {2, 4, 6}


@pytest.mark.parametrize("rate", [[], ["--read-rate", "1GB", "--compute-ms", "5"]])
def test_a_replay_is_drawn(tmp_path, rate):
    trace, drawing = tmp_path / "trace.jsonl", tmp_path / "plot.svg"
    trace.write_text(HEADER + REQUESTS)

    def draw(file):
        command = [sys.executable, "-m", "glm_fused", "replay", str(trace), "--bank", "4,2,8"]
        command += ["--plot", str(file), *rate]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert draw(drawing).returncode == 0
    text = drawing.read_text()
    assert ("predicted speed" in text) == bool(rate)
    for label in ("slots per layer (experts)", "hit rate (%)", "learned", "optimum (Belady)"):
        assert f"<!-- {label} -->" in text
    failed = draw(tmp_path / "none" / "plot.png")
    assert failed.returncode == 2
    assert re.fullmatch(r"glm-fused: error: --plot: .*No such file.*\n", failed.stderr)


def test_the_optimum_is_belady():
    """1 2 3 1 2 with two slots: keeping 1 saves one read where LRU saves none."""
    requests = [[1], [2], [3], [1], [2]]
    assert _ext.slots_simulate("lru", 4, 2, [], requests) == (0, 5)
    assert _ext.slots_simulate_optimum(4, 2, requests) == (1, 4)


@pytest.mark.parametrize("name", ["statistics", "cpp"])
def test_learned_comes_close_to_the_optimum(tmp_path, name):
    """Traces of the bundled model, in points of hit rate below Belady at the same size."""
    path = tmp_path / "trace.jsonl"
    path.write_bytes(lzma.decompress((TRACES / f"{name}.jsonl.xz").read_bytes()))
    trace, policies = read_trace(path), ["learned", "lru"]
    assert trace.tokens > 2000
    rows = replay(trace, range(5, 16), policies)["rows"]
    rates = {(row["slots"], row["policy"]): 100 * row["hit_rate"] for row in rows}
    below = {key: rates[key[0], "optimum"] - rate for key, rate in rates.items()}
    near = range(5, 16) if name == "statistics" else (5, *range(11, 16))
    for slots in range(5, 16):
        assert below[slots, "learned"] < below[slots, "lru"]
        assert below[slots, "learned"] < (10 if slots in near else 13)
        assert below[slots, "lru"] < 10 or slots < 12
