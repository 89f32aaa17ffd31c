"""``glm-fused generate --shard``: the same text, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import ring

GENERATE = ["-m", "glm_fused", "generate", "--model", "demo", "--raw", "--prompt", "def main():"]
SHARD = [*GENERATE, "--shard", "tensor"]
PIPELINE = ["--shard", "pipeline"]
SAMPLED = ["--max-tokens", "12", "--temp", "1", "--seed", "5", "--kv-format", "fp8"]


def gathers_of(model):
    """What a plan says of two machines."""
    done = alone(
        "-m",
        "glm_fused",
        "plan",
        "--model",
        model,
        *["--machine", "1GB,1GB/s"] * 2,
        "--link",
        "1us,1GB/s",
        "--json",
    )
    return json.loads(done[1])["gathers"]


def alone(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_rank_0_writes_the_text_of_one_process(tmp_path):
    code, text, _ = alone(*GENERATE, *SAMPLED)
    assert code == 0
    assert len(text) > 12
    assert ring.run(2, *SHARD, *SAMPLED, "--draft", "2", folder=tmp_path) == [text, ""]
    assert ring.run(3, *SHARD, *SAMPLED, *PIPELINE, folder=tmp_path) == [text, "", ""]


def test_gathers_are_counted(tmp_path):
    """As `glm-fused plan` counts them, but for the embedding's rows, which are added up."""
    planned = gathers_of("demo")
    first, other = ring.run(2, *SHARD, "--max-tokens", "2", "--json", folder=tmp_path)
    assert other == ""
    found = json.loads(first)["gathers"]
    assert found["gathers"] == planned["count"] - 1
    assert found["bytes"] == planned["bytes"] - 2 * 2 * 256  # bfloat16, hidden
    assert found["step_seconds"] > 0


@pytest.mark.parametrize(
    ("option", "first", "second", "shown"),
    [
        ("--max-tokens", "4", "5", "rank 0 has 4, rank 1 5."),
        ("--shard", "tensor", "pipeline", "rank 0 has 'tensor', rank 1 'pipeline'."),
    ],
)
def test_ranks_with_unlike_options_say_so(tmp_path, option, first, second, shown):
    commands = [[*SHARD, option, value] for value in (first, second)]
    for code, out, errors in ring.finish(ring.start(commands, tmp_path)):
        assert (code, out) == (2, "")
        expected = f"[shard] {option} must be the same for all: {shown}"
        assert f"glm-fused: error: {expected}\n" in errors


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (SHARD, r"[shard] start several processes with mlx.launch"),
        ([*SHARD, "--ab"], "--ab: not with --shard"),
        ([*SHARD, "--slots", "2"], "--slots: not with --shard"),
        ([*SHARD, *PIPELINE, "--draft", "2"], "--draft: not with --shard pipeline"),
        ([*SHARD, "--prompt", "-"], "--prompt -: not with --shard"),
    ],
)
def test_what_is_refused(command, message):
    code, out, errors = alone(*command)
    assert (code, out) == (2, "")
    assert errors.startswith(f"glm-fused: error: {message}")
