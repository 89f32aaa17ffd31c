"""`glm-fused profile`: stages that hold all weights, times that add up, output and errors."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import tiny_config, tiny_config_51, write_checkpoint
from test_cli import assert_one_line, run
from test_generate import write_tokenizer

import glm_fused
from glm_fused import num_threads, ops, set_num_threads
from glm_fused.checkpoint.description import describe
from glm_fused.profiling import measure, report
from glm_fused.profiling.stages import HEAD, INDEXER, ORDER, parameter_bytes, stages

OF_PROMPT = [name for name in ORDER if name != HEAD]
QUANTIZATION = {"group_size": 32, "bits": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, tiny_config(), quantization=QUANTIZATION)
    write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(measure, "YARDSTICK_BYTES", 1 << 20)
    for name in ("GLM_FUSED_REFERENCE", "GLM_FUSED_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    threads = num_threads()
    yield
    set_num_threads(threads)


def profile(model, *args):
    return ("profile", "--model", model, "--prompt-tokens", 20, "--repeats", 1, *args)


def document(capsys, model, *args):
    code, out, err = run(capsys, *profile(model, "--json", *args))
    assert (code, err) == (0, "")
    return json.loads(out)


def names(forward):
    return [row["stage"] for row in forward["stages"]]


def total(forward, key):
    return sum(row[key] for row in forward["stages"])


def test_table(capsys, model):
    code, out, err = run(capsys, *profile(model))
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= report.WIDTH
    assert "…" not in out
    decode, prompt = out.split("20 tokens after 0:")
    assert decode.startswith("one token after 20:")
    for table, expected in ((decode, ORDER), (prompt, OF_PROMPT)):
        shown = [line[2:21].strip() for line in table.splitlines()]
        rows = (*expected, report.GRAPH, report.OTHER, "whole")
        assert [name for name in shown if name in (*ORDER, *rows)] == list(rows)


def test_json(capsys, model):
    found = document(capsys, model, "--threads", 1)
    assert num_threads() == 1
    assert list(found) == ["prompt", "decode"]
    assert (found["prompt"]["tokens"], found["prompt"]["cached"]) == (20, 0)
    assert (found["decode"]["tokens"], found["decode"]["cached"]) == (1, 20)
    assert names(found["prompt"]) == OF_PROMPT
    assert names(found["decode"]) == list(ORDER)
    for forward in found.values():
        parts = total(forward, "seconds") + forward["graph_seconds"] + forward["other_seconds"]
        assert parts == pytest.approx(forward["whole_seconds"])
        for row in forward["stages"]:
            assert row["share"] == pytest.approx(row["seconds"] / forward["whole_seconds"])
            rate = (row["read_bytes"] + row["cache_bytes"]) / row["seconds"] / 1e9
            assert row["gb_per_s"] == pytest.approx(rate, rel=1e-3, abs=1e-6)
            assert row["fraction"] == pytest.approx(row["gb_per_s"] / forward["read_gb_per_s"])


def test_a_step_that_checks_drafts(capsys, model):
    found = document(capsys, model, "--verify", 3)
    assert list(found) == ["prompt", "decode", "verify"]
    assert (found["verify"]["tokens"], found["verify"]["cached"]) == (4, 21)
    assert names(found["verify"]) == list(ORDER)
    assert total(found["verify"], "read_bytes") > total(found["decode"], "read_bytes")
    _, out, _ = run(capsys, *profile(model, "--verify", 3))
    assert "4 tokens after 21:" in out


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config(tie_word_embeddings=True), tiny_config_51()],
    ids=["plain", "tied", "5.1"],
)
@pytest.mark.parametrize("quantization", [None, QUANTIZATION], ids=["bf16", "affine4"])
def test_stages_hold_every_weight(capsys, tmp_path, config, quantization):
    write_checkpoint(tmp_path, config, quantization=quantization)
    write_tokenizer(tmp_path)
    found = document(capsys, tmp_path)
    loaded, _ = glm_fused.load_model(tmp_path)
    parameters = parameter_bytes(loaded)
    assert total(found["decode"], "weight_bytes") == parameters
    ends = [loaded.layers[-1], loaded.model.norm]
    ends += [loaded.lm_head] if "lm_head" in loaded else []
    assert total(found["prompt"], "weight_bytes") == parameters - parameter_bytes(*ends)
    read = describe(tmp_path)["bytes_read_per_token"]
    if config["tie_word_embeddings"]:  # a row of it is read, and then all of it
        assert total(found["decode"], "read_bytes") == pytest.approx(read, rel=0.01)
    else:
        assert total(found["decode"], "read_bytes") == pytest.approx(read, abs=len(ORDER))


def test_cached_rows(capsys, model):
    args = glm_fused.load_model(model)[0].args
    found = document(capsys, model)["decode"]
    rows = {row["stage"]: row["cache_bytes"] for row in found["stages"]}
    full = sum(layer.is_full for layer in args.layers)
    width = args.kv_lora_rank + args.qk_rope_head_dim
    assert rows["indexer, top-k"] == full * 21 * args.index_head_dim * 2
    assert rows["attention"] == len(args.layers) * args.index_topk * width * 2
    assert sum(rows.values()) == rows["indexer, top-k"] + rows["attention"]


def test_a_short_context_scores_no_keys(capsys, model):
    long, short = document(capsys, model), document(capsys, model, "--prompt-tokens", 2)
    assert INDEXER in names(long["decode"])
    for name, forward in short.items():
        assert names(forward) == [name for name in names(long[name]) if name != INDEXER]
        assert total(forward, "weight_bytes") == total(long[name], "weight_bytes")
    assert total(short["decode"], "read_bytes") < total(long["decode"], "read_bytes")


def test_a_long_prompt_is_cut(capsys, model):
    found = document(capsys, model, "--prefill-step-size", 8)
    assert (found["prompt"]["tokens"], found["prompt"]["cached"]) == (8, 12)
    assert (found["decode"]["tokens"], found["decode"]["cached"]) == (1, 20)


@pytest.mark.parametrize("kv_format", ["fp8", "int8", "fp32"])
def test_kv_formats(capsys, model, kv_format):
    found = document(capsys, model, "--kv-format", kv_format)
    assert names(found["decode"]) == list(ORDER)


def test_streamed_experts(capsys, model):
    resident, streamed = document(capsys, model), document(capsys, model, "--slots", 4)
    for key in ("prompt", "decode"):
        assert total(streamed[key], "read_bytes") > 0
        assert total(streamed[key], "weight_bytes") < total(resident[key], "weight_bytes")
    read = [total(found["decode"], "read_bytes") for found in (resident, streamed)]
    assert read[0] == read[1]


def test_the_reference_path(capsys, model, monkeypatch):
    monkeypatch.setenv("GLM_FUSED_REFERENCE", "1")
    assert names(document(capsys, model)["decode"]) == list(ORDER)


@pytest.mark.parametrize("quantization", [None, QUANTIZATION], ids=["bf16", "affine4"])
def test_blocks_and_ops_are_the_same_stages(tmp_path, monkeypatch, quantization):
    write_checkpoint(tmp_path, tiny_config(), quantization=quantization)
    loaded, _ = glm_fused.load_model(tmp_path)
    cache = loaded.make_cache()
    mx.eval(loaded(mx.arange(20)[None], cache))

    def outputs():
        mx.random.seed(0)
        built = [stage.build() for stage in stages(loaded, cache, 1)]
        return [list(out) if isinstance(out, (tuple, list)) else [out] for out in built]

    in_blocks = outputs()
    monkeypatch.setattr(ops.blocks, "takes", lambda *_: False)
    for block, by_ops in zip(in_blocks, outputs(), strict=True):
        for a, b in zip(block, by_ops, strict=True):
            assert a.size == b.size
            assert mx.array_equal(a.reshape(-1), b.reshape(-1))


def test_plot(model, tmp_path):
    drawing = tmp_path / "step.svg"
    command = [*map(str, profile(model, "--plot", drawing))]
    run = subprocess.run([sys.executable, "-m", "glm_fused", *command], capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")
    text = drawing.read_text()
    for label in (*ORDER, report.GRAPH, report.OTHER):
        assert text.count(f"<!-- {label} -->") == (1 if label == HEAD else 2)
    assert "one token after 20" in text


def test_errors(capsys, model, tmp_path, monkeypatch):
    context = tiny_config()["max_position_embeddings"]
    many = run(capsys, *profile(model, "--prompt-tokens", context))
    assert_one_line(many, f"expected at most {context - 1}, as there is room for {context}")
    assert_one_line(run(capsys, *profile(model, "--prompt-tokens", 0)), "an integer from 1")
    assert_one_line(run(capsys, *profile(model, "--repeats", 0)), "an integer from 1 to 1000")
    assert_one_line(run(capsys, *profile(model, "--trace", "t")), "unrecognized arguments: --trace")
    assert_one_line(run(capsys, *profile(tmp_path / "none")), "none")
    missing = tmp_path / "none" / "step.png"
    assert_one_line(run(capsys, *profile(model, "--plot", missing)), "does not exist")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    without = run(capsys, *profile(model, "--plot", tmp_path / "step.png"))
    assert_one_line(without, "a plot needs matplotlib: pip install 'glm-fused[plot]'.")
    assert os.listdir(tmp_path) == []


def test_the_head_reads_a_tied_embedding(tmp_path):
    write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True))
    loaded, _ = glm_fused.load_model(tmp_path)
    cache = loaded.make_cache()
    mx.eval(loaded(mx.arange(4)[None], cache))
    head = next(stage for stage in stages(loaded, cache, 1) if stage.name == HEAD)
    assert head.held_bytes == parameter_bytes(loaded.model.norm)
    assert head.read_bytes == head.held_bytes + parameter_bytes(loaded.model.embed_tokens)
