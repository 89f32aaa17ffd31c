"""The command line: output, exit codes and errors."""

import io
import json
import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import WORDS, write_tokenizer

import glm_fused
from glm_fused import _abi, load, num_threads, ops, set_num_threads
from glm_fused.checkpoint.paths import bundled_folder, checkpoint_path
from glm_fused.cli import main
from glm_fused.ops import paths


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
    """Run the command; returns exit code, stdout, stderr."""
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
    monkeypatch.setattr("glm_fused.checkpoint.paths.bundled_folder", lambda: model)
    code, out, _ = run(capsys, "demo", "--max-tokens", "3", "--prompt", WORDS)
    assert code == 0
    assert WORDS in out
    assert "prompt, 40 tokens" in out
    assert "bit-identical: yes" in out.splitlines()
    code, out, _ = run(capsys, "demo", "--max-tokens", "3", "--prompt", WORDS, "--json")
    assert json.loads(out)["ab"]["bit_identical"] is True
    perturb(monkeypatch)
    assert run(capsys, "demo", "--max-tokens", "3", "--prompt", WORDS)[0] == 1


def test_the_bundled_checkpoint(capsys):
    assert bundled_folder().is_dir()
    code, out, _ = run(capsys, "demo", "--max-tokens", "8", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["ab"]["prompt_tokens"] > 64  # more than index_topk, so attention is sparse
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
    assert (document["cpu"]["huge_read_gb_per_s"] or 1) > 0
    code, out, _ = run(capsys, "doctor", "--threads", "1")
    assert code == 0
    assert "1 threads" in out
    assert "fused equals reference" in out
    assert f"huge pages{'':<10}{document['cpu']['huge_pages'] or 'none'}" in out


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


STREAMED = ("--slots", "4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "lru"], "--policy: needs --memory-budget, --slots or --sidecar"),
        (["--lookahead", "0"], "--lookahead: needs"),
        (["--context", "64", "--direct-io"], "--context, --direct-io: needs"),
        (["--read-depth", "4", "--read-split", "1MiB"], "--read-depth, --read-split: needs"),
        (["--trace", "t.jsonl"], "--trace: needs"),
        ([*STREAMED, "--policy", "pinned"], "--pins and --policy pinned need one another"),
        ([*STREAMED, "--pins", "p.json"], "--pins and --policy pinned need one another"),
        ([*STREAMED, "--pins", "p.json", "--policy", "lru"], "need one another"),
        ([*STREAMED, "--context", "4097"], "context of 4,097 tokens, expected 1 to 4,096"),
        ([*STREAMED, "--trace", "none/t.jsonl"], "none does not exist, to write t.jsonl into"),
        (["--memory-budget", "24"], "--memory-budget: expected a size with its unit"),
        ([*STREAMED, "--read-split", "24"], "--read-split: expected a size with its unit"),
        (["--sidecar", ""], "--sidecar: expected a path, found an empty text"),
        (["--max-tokens", "4057"], "40 prompt tokens and 4057 more"),
        (["--top-p", "0.9"], "--top-p: greedy decoding"),
        (["--temp", "0", "--top-k", "5", "--min-p", "0.1"], "--top-k, --min-p: greedy decoding"),
        (["--repetition-context-size", "9"], "needs --repetition-penalty"),
        (["--stop", ""], "not empty"),
        (["--ab", "--stop", "x"], "--stop: not with --ab"),
        (["--max-tok", "4"], "unrecognized arguments: --max-tok 4"),
        (["--verb"], "unrecognized arguments: --verb"),
    ],
)
def test_what_would_be_ignored_is_refused(capsys, monkeypatch, tmp_path, model, options, message):
    monkeypatch.chdir(tmp_path)
    arguments = ("generate", "--model", model, "--prompt", WORDS, "--raw", *options)
    assert_one_line(run(capsys, *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_what_asks_for_nothing_is_not_refused(capsys, model):
    _, plain, _ = run(capsys, *generate(model))
    options = ("--temp", "0", "--top-p", "1", "--top-k", "0", "--min-p", "0", "--seed", "4")
    assert run(capsys, *generate(model, *options)) == (0, plain, "")


@pytest.mark.parametrize(
    "command",
    [("generate", "--frobnicate"), ("sidecar", "import"), ("replay",), ("generate", "--model")],
)
def test_errors_of_arguments_name_the_help(capsys, command):
    prog = " ".join(["glm-fused", *(word for word in command if not word.startswith("-"))])
    assert_one_line(run(capsys, *command), f"(see {prog} --help)")


def test_help_has_examples_exit_codes_and_variables(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(text in out for text in ("examples:", "exit codes:", "GLM_FUSED_NUM_THREADS"))
    code, out, _ = run(capsys, "generate", "--help")
    assert code == 0
    assert all(text in out for text in ("examples:", "exit codes:", "--repetition-penalty"))


def test_a_stop_text(capsys, model):
    _, plain, _ = run(capsys, *generate(model))
    words = plain.split()
    code, out, _ = run(capsys, *generate(model, "--stop", "never", "--stop", words[2]))
    assert (code, out) == (0, plain[: plain.index(words[2])] + "\n")


def test_defaults_of_the_checkpoint(capsys, model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 2.0, "top_p": 0.9}')
    code, out, err = run(capsys, *generate(tmp_path, "--json", "--verbose", "--top-p", "0.5"))
    sampling = json.loads(out)["sampling"]
    assert (code, sampling["temp"], sampling["top_p"]) == (0, 2.0, 0.5)
    assert sampling["from_checkpoint"] == ["temp"]
    assert "temp 2.0, top_p 0.5; generation_config.json says temp" in err
    _, plain, _ = run(capsys, *generate(model))
    assert run(capsys, *generate(tmp_path, "--temp", "0")) == (0, plain, "")
    config.write_text('{"temperature": "hot"}')
    assert_one_line(run(capsys, *generate(tmp_path)), f"{config}: temperature is 'hot'")


def test_a_prompt_that_is_too_long_is_one_line(model):
    """transformers would warn of it on stderr."""
    config = json.loads((Path(model) / "tokenizer_config.json").read_text())
    assert config.get("model_max_length", 10**30) > 4096
    arguments = command("generate", "--model", "demo", "--prompt", "x = 1\n" * 5000)
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert_one_line((result.returncode, result.stdout, result.stderr), "expected 1 to 8191")


def test_demo_names_the_bundled_model(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_path("demo") == bundled_folder()
    assert run(capsys, "inspect", "demo")[0] == 0
    (tmp_path / "demo").mkdir()
    assert_one_line(run(capsys, "inspect", "demo"), "only where there is no such folder")
    write_checkpoint(tmp_path / "demo", tiny_config())
    write_tokenizer(tmp_path / "demo")
    code, _, err = run(capsys, *generate("demo"))
    assert (code, err) == (0, "demo is the folder ./demo here, not the bundled model.\n")


def test_folders_that_are_no_checkpoints(capsys, tmp_path):
    def refused(message):
        assert_one_line(
            run(capsys, "sidecar", "import", "--model", tmp_path, tmp_path / "s"), message
        )
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            load(tmp_path)

    refused("has no config.json, so it is no folder of a checkpoint. It is empty.")
    (tmp_path / "model.bin").touch()
    refused("has no config.json, so it is no folder of a checkpoint.")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").touch()
    refused(f"Its folder {tmp_path / 'inner'} has one.")
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    refused(f"a cache of the Hugging Face Hub; the model is {snapshot}")
    with pytest.raises(ValueError, match="the path is empty"):
        load("")
    with pytest.raises(FileNotFoundError, match="hf download zai-org/GLM-5"):
        load("zai-org/GLM-5")


TERMINAL = """
import fcntl, os, pty, struct, sys, termios
pid, terminal = pty.fork()
if pid == 0:
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    os.execv(sys.argv[1], sys.argv[1:])
shown = b""
try:
    while data := os.read(terminal, 65536):
        shown += data
except OSError:  # the terminal has no writer any more
    pass
sys.stdout.buffer.write(shown)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's terminals")
def test_progress_on_a_terminal(model):
    arguments = [*command(*generate(model)), "--ab"]
    run = subprocess.run(
        [sys.executable, "-c", TERMINAL, *arguments], capture_output=True, check=False, timeout=120
    )
    shown = run.stdout.decode()
    assert run.returncode == 0
    for path in ("fused", "reference"):
        assert f"{path}, prompt:   0%" in shown
        assert "/40 tokens" in shown
        assert f"{path}, generation:   0%" in shown
    assert "bit-identical: yes" in shown.rpartition("\r \r")[2]


def test_the_library_is_listed():
    names = dir(glm_fused)
    assert {"load", "load_model", "generate", "stream_generate", "StreamOptions"} <= set(names)
    text = pydoc.plain(pydoc.render_doc(glm_fused))
    assert all(f"{name}(" in text for name in ("load", "load_model", "generate"))
    code = "import sys, glm_fused; dir(glm_fused); print('mlx_lm' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    code = "import glm_fused.generation.generate, glm_fused; print(callable(glm_fused.generate))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


def test_no_command(capsys):
    assert_one_line(run(capsys), "COMMAND")


@pytest.mark.parametrize("command", [("generate", "--prompt", "w1", "--model"), ("inspect",)])
def test_bad_paths(capsys, tmp_path, command):
    assert_one_line(run(capsys, *command, tmp_path / "none"), "does not exist")
    assert_one_line(run(capsys, *command, "zai-org/GLM-5.2"), "zai-org/GLM-5.2 does not exist here")
    assert_one_line(run(capsys, *command, tmp_path), "config.json")
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert_one_line(run(capsys, *command, tmp_path / "config.json"), "is a file")
    assert_one_line(run(capsys, *command, ""), "expected a path, found an empty text")
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
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("glm_fused.engine.Engine.__init__", interrupt)
    assert run(capsys, *generate(model)) == (130, "", "")


def command(*args):
    return [sys.executable, "-m", "glm_fused", *args]


def test_module_and_closed_pipe(model):
    """A reader that goes away causes no traceback, nor Python's complaint at exit."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = command("generate", "--model", model, "--prompt", WORDS, "--max-tokens", "50")
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (141, "")
