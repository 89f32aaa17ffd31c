"""Shells complete every command and option, with scripts that they can read."""

import argparse
import shutil
import subprocess

import pytest

from glm_fused import cli

SHELLS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "tcsh": ["tcsh", "-n"]}


def script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def options(parser, words=()):
    """Yield the words before each option or choice of every command, and it."""
    for action in parser._actions:
        yield from ((words, flag) for flag in action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield words, name
                yield from options(inner, (*words, name))
        elif action.choices:
            yield from ((words, str(choice)) for choice in action.choices)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_has_all_commands_and_parses(capsys, tmp_path, shell):
    text = script(capsys, shell)
    wanted = {word for _, word in options(cli._parser())}
    assert {"chat", "generate", "--memory-budget", "export", "int8"} <= wanted
    missing = [word for word in wanted if word.lstrip("-") not in text]
    assert missing == []
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    file = tmp_path / "script"
    file.write_text(text)
    run = subprocess.run([*SHELLS[shell], file], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    file.write_text(text + "\nif (\n")  # what does not parse is noticed
    run = subprocess.run([*SHELLS[shell], file], capture_output=True, text=True, check=False)
    assert run.returncode != 0 or run.stderr


def completed(script, *words):
    """What bash completes the last word to."""
    line = " ".join(words)
    code = f"""
source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1} COMP_LINE='{line}' COMP_POINT={len(line)}
$(complete -p glm-fused | sed 's/.*-F \\([^ ]*\\).*/\\1/') glm-fused '{words[-1]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    run = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="of bash")
def test_bash_completes(capsys, monkeypatch, tmp_path):
    file = tmp_path / "script"
    file.write_text(script(capsys, "bash"))
    monkeypatch.chdir(tmp_path)
    assert completed(file, "glm-fused", "ch") == {"chat"}
    assert completed(file, "glm-fused", "generate", "--kv") == {"--kv-format"}
    assert completed(file, "glm-fused", "generate", "--kv-format", "f") == {"fp16", "fp32", "fp8"}
    assert completed(file, "glm-fused", "sidecar", "ver") == {"verify"}
    assert completed(file, "glm-fused", "generate", "--model", "scr") == {"script"}
    assert completed(file, "glm-fused", "generate", "--prompt", "scr") == set()


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["completion", "fish"])
    assert "bash" in capsys.readouterr().err
