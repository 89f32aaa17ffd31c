"""What a command makes of errors, of numbers beyond 64 bits and of pins."""

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import write_tokenizer

from glm_fused.cli import main
from glm_fused.memory import parse_size
from glm_fused.models.config import args_from_config
from glm_fused.streaming.pins import read_pins

HUGE = "9" * 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, tiny_config())
    write_tokenizer(folder)
    return folder


def run(capsys, *args):
    """Run the command; returns its exit code and stderr, which has to be one line."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert len(err) < 600
    return code, err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 2, "error: out of memory.\n"),
        (MemoryError("[malloc] 8 EB"), 2, "error: out of memory: [malloc] 8 EB\n"),
        (KeyError("x"), 70, "a bug of glm-fused: KeyError: 'x' (please report it, with"),
        (OverflowError("int too big"), 70, "a bug of glm-fused: OverflowError: int too big"),
        (RecursionError("too deep"), 70, "a bug of glm-fused: RecursionError: too deep"),
        (RuntimeError("a file\nis gone"), 2, "error: a file is gone\n"),
    ],
)
def test_a_bug_is_told_from_what_a_user_can_mend(capsys, monkeypatch, folder, error, code, text):
    def fail(*_):
        raise error

    monkeypatch.setattr("glm_fused.checkpoint.description.describe_checkpoint", fail)
    monkeypatch.delenv("GLM_FUSED_DEBUG", raising=False)
    found, err = run(capsys, "inspect", folder)
    assert found == code
    assert err.startswith(f"glm-fused: {text}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory-budget", HUGE),
        ("--memory-budget", f"{HUGE}.5TB"),
        ("--slots", "2", "--read-split", f"{HUGE}GiB"),
        ("--max-tokens", HUGE),
        ("--max-tokens", "9" * 5000),
        ("--threads", HUGE),
        ("--temp", "1e400"),
        ("--top-p", "1e400"),
        ("--seed", str(2**64)),
        ("--slots", HUGE),
        ("--context", str(2**64)),
        ("--no\nsuch", "x"),
    ],
)
def test_numbers_beyond_64_bits(capsys, folder, arguments):
    code, err = run(capsys, "generate", "--model", folder, "--prompt", "w1", *arguments)
    assert code == 2
    assert err.startswith("glm-fused: error: ")


def test_sizes_up_to_63_bits():
    assert parse_size("8000000TB") == 8 * 10**18
    for text in ("9223372036854775808B", "10000000TB", f"{HUGE}GB"):
        with pytest.raises(ValueError, match="a size below 2\\^63 bytes"):
            parse_size(text)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"0": [1]}, "[pins] layer 0 has no routed experts; those that do are 1 to 4."),
        ({"99": [1]}, "[pins] layer 99 has no routed experts; those that do are 1 to 4."),
        ({"1": [8]}, "[pins] layer 1: expert 8, expected 0 to 7."),
        ({"1": [10**400]}, "[pins] layer 1: expert an integer of 1329 bits, expected 0 to 7."),
        ({"1": [3, 5, 3]}, "[pins] layer 1: expert 3 is named twice."),
        ({"1": [0, 1, 2, 3]}, "4 pinned ones leave 1, a token needs 2."),
        ({"1": [0, 1, 2, 3, 4, 5]}, "slots has no room for 0 spare and 6 pinned ones."),
    ],
)
def test_pins_out_of_range(capsys, folder, tmp_path, pins, message):
    path = tmp_path / "pins.json"
    path.write_text(json.dumps(pins))
    options = ("--slots", "5", "--policy", "pinned", "--pins", path)
    code, err = run(capsys, "generate", "--model", folder, "--prompt", "w1", *options)
    assert code == 2
    assert err.endswith(f"{message}\n")


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{", "[" * 100_000, '{"01": [1]}', '{"x": [1]}', '{"²": [1]}', '{"1": [true]}'),
        *('{"1": 1}', '{"1": [1.5]}', '{"1": [-1]}'),
        *(f'{{"{HUGE}": [1]}}', f'{{"1": [{"9" * 5000}]}}'),
    ],
)
def test_what_are_no_pins(tmp_path, text):
    path = tmp_path / "pins.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)) as error:
        read_pins(path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-300},
        {"routed_scaling_factor": 1e-300},
        {"rope_parameters": {"rope_type": "yarn", "beta_slow": 5e-324}},
        {"rope_parameters": {"rope_type": "yarn", "beta_fast": 1e-300}},
        {"rope_parameters": {"rope_type": "yarn", "attention_factor": 1e-300}},
    ],
)
def test_numbers_that_float32_takes_for_zero(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}.*expected|must be a number"):
        args_from_config(tiny_config(**changes))


@pytest.mark.parametrize("eos", [256, 10**400, [250, 2**63]], ids=["near", "huge", "listed"])
def test_a_stop_token_outside_the_vocabulary(capsys, folder, eos):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": eos}))
    code, err = run(capsys, "generate", "--model", folder, "--prompt", "w1")
    path.unlink()
    assert code == 2
    assert "eos_token_id" in err
    assert "expected 0 to 255" in err


@pytest.mark.parametrize(
    ("closed", "code", "text"),
    [
        ("<&-", 2, "glm-fused: error: --prompt -: stdin is closed.\n"),
        (">&-", 2, "glm-fused: error: stdout is closed.\n"),
        ("2>/dev/full", 2, ""),
    ],
)
def test_closed_streams(folder, closed, code, text):
    path = folder if closed == "<&-" else folder / "none"
    command = f"{sys.executable} -m glm_fused generate --model {path} --prompt - {closed}"
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, env=environment
    )
    assert (result.returncode, result.stderr) == (code, text)


def test_a_prompt_that_is_not_text(capsys, monkeypatch, folder):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    code, err = run(capsys, "generate", "--model", folder, "--prompt", "-")
    assert (code, err) == (2, "glm-fused: error: --prompt -: stdin is not valid UTF-8.\n")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no such limit")
def test_a_result_that_memory_cannot_hold():
    """MLX hands out a null pointer where the system has no memory."""
    code = """if True:
        import resource
        import mlx.core as mx
        from glm_fused import ops
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.RLIM_INFINITY))
        q, keys, weights = mx.zeros((1, 1, 1, 64)), mx.zeros((1, 9, 64)), mx.zeros((1, 1, 1))
        try:
            mx.eval(ops.indexer_topk(q, keys, weights, 2**31 - 1, scale=0.1))
        except RuntimeError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout == "[IndexerTopk] out of memory for 8589934588 bytes of output.\n"
