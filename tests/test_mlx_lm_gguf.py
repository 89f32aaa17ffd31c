"""mlx-lm's own commands on GGUF files, and on folders that hold one."""

import pytest
from gguf_files import write_gguf
from test_mlx_lm_tools import PROMPT, continuation, folder, generating, one_line, run  # noqa: F401

from glm_fused.checkpoint.description import describe
from glm_fused.cli import main


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The bundled model with experts in blocks, alone in a folder."""
    path = tmp_path_factory.mktemp("gguf") / "model" / "m.gguf"
    path.parent.mkdir()
    assert main(["convert", "--model", "demo", str(path), "--experts", "q4_0"]) == 0
    return path


@pytest.mark.parametrize("named", ["file", "folder"])
@pytest.mark.parametrize("more", [(), ("--slots", 5)])
def test_generate(run, gguf, named, more):  # noqa: F811
    path = gguf if named == "file" else gguf.parent
    code, out, err = run(*generating("--model", path, *more))
    assert code == 0, err
    assert continuation(gguf).strip() == out.strip()


def test_the_chat_template_is_the_file_s(run, gguf):  # noqa: F811
    prompt = ("--prompt", PROMPT, "--max-tokens", 4)
    code, out, err = run("generate", "--model", gguf, *prompt)
    assert code == 0, err
    assert "Prompt:" in out


def test_packed_caches(run, gguf):  # noqa: F811
    code, _, err = run(*generating("--model", gguf, "--kv-format", "fp8"))
    assert code == 0, err


def test_convert_makes_a_folder_of_it(run, gguf, tmp_path):  # noqa: F811
    code, _, err = run("convert", "--hf-path", gguf, "--mlx-path", tmp_path / "out")
    assert code == 0, err
    formats = {
        kind: found["formats"] for kind, found in describe(tmp_path / "out")["formats"].items()
    }
    assert formats["experts down"] == ["bf16"]
    arguments = ["convert", "--model", str(gguf), str(tmp_path / "packed"), "--experts", "mxfp4"]
    assert main(arguments) == 0
    found = describe(tmp_path / "packed")
    assert found["formats"]["experts down"]["formats"] == ["mxfp4"]
    assert found["eos_token_id"] == describe(gguf)["eos_token_id"]


def test_files_that_are_none_are_one_clear_error(run, tmp_path):  # noqa: F811
    text = tmp_path / "m.txt"
    text.write_text("x")
    code, _, err = run(*generating("--model", text))
    one_line(code, err, "m.txt is a file, expected the folder of a checkpoint or a .gguf file")
    (tmp_path / "m.gguf").write_text("x" * 40)
    code, _, err = run(*generating("--model", tmp_path))
    one_line(code, err, "m.gguf: begins with b'xxxx', expected b'GGUF'")
    path = write_gguf(tmp_path / "bare" / "m.gguf")
    code, _, err = run(*generating("--model", path))
    one_line(code, err, "m.gguf: key 'tokenizer.ggml.model' missing")
    (tmp_path / "n.gguf").write_text("x" * 40)
    code, _, err = run(*generating("--model", tmp_path))
    one_line(code, err, "has several GGUF models, name one of them: m.gguf, n.gguf")
