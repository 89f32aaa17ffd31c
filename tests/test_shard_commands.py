"""``glm-fused generate --shard``: the same text, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import ring
from mlx.utils import tree_flatten

from glm_fused import load_model
from glm_fused.measuring.rank_plan import format_ranks, rank_plan

GENERATE = ["-m", "glm_fused", "generate", "--model", "demo", "--raw", "--prompt", "def main():"]
SHARD = [*GENERATE, "--shard", "tensor"]
PIPELINE = ["--shard", "pipeline"]
SLOTS = "8", "13"  # of 16, of each rank
BUDGETS = ["--slots", "9"], ["--memory-budget", "1GB"], ["--slots", "5"]
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
    return json.loads(done[1])["plans"]["tensor"]["gathers"]


def alone(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_rank_0_writes_the_text_of_one_process(tmp_path):
    """With drafts and streamed experts, of which ranks have unlike numbers in memory."""
    code, text, _ = alone(*GENERATE, *SAMPLED)
    assert code == 0
    assert len(text) > 12
    drafts = [*SHARD, *SAMPLED, "--draft", "2"]
    assert ring.run(2, *drafts, folder=tmp_path) == [text, ""]
    assert ring.run(3, *drafts, *PIPELINE, folder=tmp_path) == [text, "", ""]
    ends = ring.finish(ring.start([[*drafts, "--slots", slots] for slots in SLOTS], tmp_path))
    assert [(code, out) for code, out, _ in ends] == [(0, text), (0, "")], ends


def test_ranks_that_have_layers_stream_their_experts_within_their_budgets(tmp_path):
    """Of three the first has a dense layer and MTP's, which drafts, and each other three layers."""
    _, text, _ = alone(*GENERATE, *SAMPLED)
    model, _ = load_model("demo", lazy=True, mtp=True)
    whole = rank_plan(model, 256)["weights"]
    experts = [
        sum(array.nbytes for _, array in tree_flatten(layer.mlp.switch_mlp.parameters()))
        for layer in model.model.layers[1:]
    ]
    command = [*SHARD, *SAMPLED, *PIPELINE, "--draft", "2", "--json"]
    ends = ring.finish(ring.start([[*command, *own] for own in BUDGETS], tmp_path))
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    answer = json.loads(ends[0][1])
    assert answer["text"] + "\n" == text
    found = answer["ranks"]
    assert format_ranks(found) in ends[0][2]
    assert [plan["rank"] for plan in found] == [0, 1, 2]
    slots = [plan["slots"] * 16 for plan in found]
    assert slots == [9 * experts[6], 16 * sum(experts[:3]), 5 * sum(experts[3:6])]
    for kind in ("attention", "shared experts", "router"):
        assert sum(plan["weights"].get(kind, 0) for plan in found) == whole[kind]
    assert found[1]["total"] <= found[1]["budget"] == 1_000_000_000


@pytest.mark.slow
def test_ranks_with_unlike_slots_draft_as_many(tmp_path):
    """One of a pipeline has slots for the experts of one token, the other for any number."""
    command = [*GENERATE, "--max-tokens", "60", "--seed", "5"]
    _, text, _ = alone(*command)
    drafts = [*command, *PIPELINE, "--draft", "auto"]
    ends = ring.finish(ring.start([[*drafts, "--slots", slots] for slots in ("4", "16")], tmp_path))
    assert [(code, out) for code, out, _ in ends] == [(0, text), (0, "")], ends


@pytest.mark.parametrize("streamed", [False, True])
def test_rank_0_says_what_each_rank_holds(tmp_path, streamed):
    whole = rank_plan(load_model("demo", lazy=True, mtp=True)[0], 256)["weights"]
    own = [["--slots", slots] for slots in SLOTS] if streamed else [[], []]
    options = ["--max-tokens", "2", "--json", "--draft", "2"]
    ends = ring.finish(ring.start([[*SHARD, *options, *each] for each in own], tmp_path))
    (code, out, said), (other_code, other_out, other_said) = ends
    assert (code, other_code, other_out) == (0, 0, ""), ends
    assert "rank " not in other_said
    found = json.loads(out)["ranks"]
    assert [line for line in said.splitlines() if line.startswith("rank ")] == format_ranks(
        found
    ).splitlines()
    experts = sum(nbytes for kind, nbytes in whole.items() if kind.startswith("experts"))
    for rank, plan in enumerate(found):
        assert plan["rank"] == rank
        assert plan["weights"]["norms"] == whole["norms"]
        assert plan["weights"]["embed_q"] == whole["embed_q"] / 2
        assert "experts gate" in plan["weights"] or streamed
        assert plan["slots"] == (experts / 2 * int(SLOTS[rank]) / 16 if streamed else 0)
        held = sum(plan["weights"].values()) + plan["slots"] + plan["cache"] + plan["temporaries"]
        program = plan["total"] - held
        assert 50 << 20 < program < 500 << 20 if streamed else program == 0
        assert plan["total"] <= plan["budget"]


def test_all_ranks_stream_experts_or_none(tmp_path):
    ends = ring.finish(ring.start([SHARD, [*SHARD, "--slots", "8"]], tmp_path))
    for code, out, errors in ends:
        assert (code, out) == (2, "")
        expected = "whether experts are streamed must be the same for all: rank 0 has False, rank 1"
        assert f"glm-fused: error: [shard] {expected} True.\n" in errors


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
        (
            [*SHARD, "--sidecar", "folder"],
            "--sidecar: not with --shard tensor, as its checksums are of whole",
        ),
        ([*SHARD, "--slots", "4", "--trace", "trace"], "--trace: not with --shard"),
        ([*SHARD, "--prompt", "-"], "--prompt -: not with --shard"),
    ],
)
def test_what_is_refused(command, message):
    code, out, errors = alone(*command)
    assert (code, out) == (2, "")
    assert errors.startswith(f"glm-fused: error: {message}")
