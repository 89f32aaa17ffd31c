"""The command line: output, exit codes and errors."""

import io
import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import WORDS, write_tokenizer

from glm_fused import _abi, demo, num_threads, ops, paths, set_num_threads
from glm_fused.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, tiny_config(), quantization={"group_size": 32, "bits": 4})
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("GLM_FUSED_REFERENCE", "GLM_FUSED_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    threads = num_threads()
    yield
    set_num_threads(threads)


def run(capsys, *args):
    """Exit code, stdout, stderr."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def generate(model, *args):
    return ("generate", "--model", model, "--prompt", WORDS, "--max-tokens", "5", *args)


def perturb(monkeypatch):
    original = ops.moe_decode

    def perturbed(x, *args, **kwargs):
        y = original(x, *args, **kwargs)
        return y if paths.use_reference() else y + (mx.arange(y.shape[1]) == 5).astype(y.dtype)

    monkeypatch.setattr(ops, "moe_decode", perturbed)


def test_generate(capsys, model):
    code, out, err = run(capsys, *generate(model))
    assert (code, err) == (0, "")
    assert len(out.split()) == 5
    assert out.endswith("\n")


def test_generate_verbose(capsys, model):
    _, plain, _ = run(capsys, *generate(model))
    code, out, err = run(capsys, *generate(model, "--verbose"))
    assert (code, out) == (0, plain)
    assert "40 tokens" in err
    assert "5 tokens" in err
    assert "peak memory" in err


def test_generate_json(capsys, model):
    _, plain, _ = run(capsys, *generate(model))
    code, out, err = run(capsys, *generate(model, "--json"))
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["text"].strip() == plain.strip()
    assert len(document["tokens"]) == document["generation_tokens"] == 5
    assert document["prompt_tokens"] == 40
    assert document["finish_reason"] == "length"
    assert document["prompt_tps"] > 0
    assert document["generation_tps"] > 0
    assert document["peak_memory_bytes"] > 0


def test_prompt_from_stdin(capsys, monkeypatch, model):
    _, expected, _ = run(capsys, *generate(model))
    monkeypatch.setattr(sys, "stdin", io.StringIO(WORDS))
    arguments = ["generate", "--model", model, "--prompt", "-", "--max-tokens", "5"]
    assert run(capsys, *arguments) == (0, expected, "")


def test_seed(capsys, model):
    sample = generate(model, "--temp", "2", "--top-p", "0.9", "--seed", "3")
    assert run(capsys, *sample) == run(capsys, *sample)
    assert run(capsys, *sample) != run(capsys, *sample[:-1], "4")


def test_threads(capsys, model):
    _, expected, _ = run(capsys, *generate(model, "--threads", "1"))
    assert num_threads() == 1
    assert run(capsys, *generate(model, "--threads", "3")) == (0, expected, "")
    assert num_threads() == 3


def test_ab(capsys, model):
    code, out, err = run(capsys, *generate(model, "--ab"))
    assert (code, err) == (0, "")
    assert "bit-identical: yes" in out.splitlines()
    assert "fused" in out
    assert "reference" in out


def test_ab_json(capsys, model):
    code, out, _ = run(capsys, *generate(model, "--ab", "--json"))
    document = json.loads(out)
    assert code == 0
    assert document["bit_identical"] is True
    assert document["first_difference"] is None
    assert document["steps"] == len(document["tokens"]) == len(document["text"].split()) == 5
    assert document["fused"]["decode_tps"] > 0
    assert document["reference"]["prefill_tps"] > 0
    assert document["speedup"]["decode"] > 0


def test_ab_finds_a_difference(capsys, monkeypatch, model):
    perturb(monkeypatch)
    code, out, _ = run(capsys, *generate(model, "--ab"))
    assert code == 1
    assert "bit-identical: no" in out.splitlines()
    code, out, _ = run(capsys, *generate(model, "--ab", "--json"))
    assert code == 1
    assert json.loads(out)["first_difference"]["step"] == 0


def test_demo(capsys, monkeypatch, model):
    monkeypatch.setattr(demo, "checkpoint_folder", lambda: model)
    monkeypatch.setattr("glm_fused.commands._load", lambda path, threads: load_demo(path))
    code, out, _ = run(capsys, "demo", "--max-tokens", "3", "--prompt", WORDS)
    assert code == 0
    assert WORDS in out
    assert "prompt, 40 tokens" in out
    assert "bit-identical: yes" in out.splitlines()
    code, out, _ = run(capsys, "demo", "--max-tokens", "3", "--prompt", WORDS, "--json")
    assert json.loads(out)["ab"]["bit_identical"] is True
    perturb(monkeypatch)
    assert run(capsys, "demo", "--max-tokens", "3", "--prompt", WORDS)[0] == 1


def load_demo(path):
    from glm_fused import load

    return load(path)


def test_the_bundled_checkpoint(capsys):
    assert demo.checkpoint_folder().is_dir()
    code, out, _ = run(capsys, "demo", "--max-tokens", "8", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["ab"]["prompt_tokens"] > 64  # index_topk: attention is sparse
    assert document["text"]


def test_inspect(capsys, model):
    code, out, _ = run(capsys, "inspect", model)
    assert code == 0
    assert "GLM-5.2" in out
    code, out, _ = run(capsys, "inspect", model, "--json")
    assert json.loads(out)["layers"] == 5


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("GLM_FUSED_REFERENCE", "off")
    code, out, _ = run(capsys, "doctor", "--json")
    document = json.loads(out)
    assert (code, document["ok"]) == (0, True)
    assert document["versions"]["mlx"]
    assert document["environment"]["GLM_FUSED_REFERENCE"] == "off"
    assert document["cpu"]["read_gb_per_s"] > 0
    code, out, _ = run(capsys, "doctor", "--threads", "1")
    assert code == 0
    assert "1 threads" in out
    assert "fused equals reference" in out


def test_doctor_reports_an_extension_that_does_not_fit(capsys, monkeypatch):
    def check():
        raise ImportError("glm_fused was built with mlx 0.1")

    monkeypatch.setattr(_abi, "check", check)
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "FAILED  extension: glm_fused was built with mlx 0.1" in out
    assert "python" in out


def test_doctor_finds_wrong_results(capsys, monkeypatch):
    original = ops.moe_decode

    def wrong(*args, reference):
        y = original(*args, reference=reference)
        return y if reference else y + 1

    monkeypatch.setattr(ops, "moe_decode", wrong)
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 1
    assert not json.loads(out)["checks"]["fused equals reference"]["ok"]


def assert_one_line(result, message):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("glm-fused: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temp", "-1"], "--temp"),
        (["--temp", "inf"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.1"], "--top-p"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--max-tokens", "many"], "'many'"),
        (["--threads", "0"], "--threads"),
        (["--threads", "1025"], "--threads"),
        (["--seed", "-3"], "--seed"),
        (["--frobnicate"], "--frobnicate"),
        (["--prompt", ""], "0 tokens"),
    ],
)
def test_bad_options(capsys, model, options, message):
    assert_one_line(run(capsys, *generate(model, *options)), message)


def test_no_command(capsys):
    assert_one_line(run(capsys), "COMMAND")


@pytest.mark.parametrize("command", [("generate", "--prompt", "w1", "--model"), ("inspect",)])
def test_bad_paths(capsys, tmp_path, command):
    assert_one_line(run(capsys, *command, tmp_path / "none"), "does not exist")
    assert_one_line(run(capsys, *command, "zai-org/GLM-5.2"), "hf download zai-org/GLM-5.2")
    assert_one_line(run(capsys, *command, tmp_path), "config.json")
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert_one_line(run(capsys, *command, tmp_path / "config.json"), "is a file")
    assert_one_line(run(capsys, *command, tmp_path), "config.json")


def test_no_tokenizer(capsys, tmp_path):
    write_checkpoint(tmp_path, tiny_config())
    assert_one_line(run(capsys, *generate(tmp_path)), "tokenizer")


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "[]"])
def test_corrupt_tokenizer(capsys, tmp_path, text):
    write_checkpoint(tmp_path, tiny_config())
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    assert_one_line(run(capsys, *generate(tmp_path)), "tokenizer")


def test_debug_keeps_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("GLM_FUSED_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["inspect", str(tmp_path)])


def test_interrupt_is_quiet(capsys, monkeypatch, model):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("glm_fused.commands._load", interrupt)
    assert run(capsys, *generate(model)) == (130, "", "")


def command(*args):
    return [sys.executable, "-m", "glm_fused", *args]


def test_module_and_closed_pipe(model):
    """A reader that goes away: no traceback, nor Python's complaint at exit."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = command("generate", "--model", model, "--prompt", WORDS, "--max-tokens", "50")
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (141, "")
