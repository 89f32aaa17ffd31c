"""The pages in docs/ as a test reads them: their blocks, their commands, and how one is run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import ring

from glm_fused.cli import main

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
URL = "http://127.0.0.1:8080"  # where the pages' server is

# What stands in the pages for something of the reader's, and what a test has in its place.
# Other names in capitals (SIDECAR, DIR, MXFP4, CACHES) are folders that the commands make.
HOSTS = "127.0.0.1,127.0.0.1"
IN_PLACE = {"PATH": "demo", "ORG/NAME": "demo", "FLOATS": "floats", "ADDRESS1,ADDRESS2": HOSTS}
# Options that come after a command's own, so that a test need not wait for it.
SHORTER = {
    "demo": ["--max-tokens", "4", "--prompt", "def f():"],
    "profile": ["--repeats", "1", "--prompt-tokens", "32"],
    "serve": ["--port", "0"],
}

_BLOCK = re.compile(r"^(?:<!-- (.*) -->\n)?```(\w*)(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: the remark above it ("" without one), its language, text and first line."""

    remark: str
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page. Raises ValueError for a fence that is not one of a block's."""
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    words = [match[3] for match in found if match[3]]
    if text.count("```") != 2 * len(found) or words:
        raise ValueError(f"{page.name} has a fence that is not closed, or words after one: {words}")
    return [Block(m[1] or "", m[2], m[4], text[: m.start()].count("\n") + 1) for m in found]


def commands(block: Block) -> list[str]:
    """The lines of a block that are commands."""
    lines = [line.strip() for line in block.text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@dataclass(frozen=True)
class Ran:
    """What a command ended with."""

    code: int
    out: str
    err: str


def run(line: str, url: str) -> Ran:
    """Run one command of a page here; ``url`` is the server's.

    ``glm-fused`` runs in this process, or in one of its own where the environment is set before it;
    Python in the repository; what else there is in a shell. Raises ValueError for anything else.
    """
    first, piped, rest = line.partition(" | ")
    stdin = shell(first).out if piped else ""
    words = shlex.split(rest if piped else line, comments=True)
    variables = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    program = words[0]
    if program == "glm-fused":
        return glm_fused([IN_PLACE.get(word, word) for word in words[1:]], variables, stdin)
    if program == "mlx.launch":
        return launched([IN_PLACE.get(word, word) for word in words])
    if program == "python" and words[1] == "-m":
        return process([sys.executable, *words[1:]], variables, cwd=REPOSITORY)
    if program in ("curl", "python", "printf") and not piped:
        return shell(line.replace(URL, url))
    raise ValueError(f"no test knows how to run {line!r}")


def glm_fused(words: list[str], variables: dict[str, str], stdin: str) -> Ran:
    """Run the command line's own command."""
    words = [*words, *SHORTER.get(words[0], [])]
    if variables:
        return process([sys.executable, "-m", "glm_fused", *words], variables)
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.stdin", io.StringIO(stdin)),
    ):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    return Ran(code, out.getvalue(), err.getvalue())


def launched(words: list[str]) -> Ran:
    """Run the command line's own command as ranks; a server is asked how it is, and ended."""
    at = words.index("glm-fused")
    ours = [sys.executable, "-m", "glm_fused", *words[at + 1 :], *SHORTER.get(words[at + 1], [])]
    first, *options = words[:at]
    options += ["--starting-port", str(ring.free_ports(1)[0]), "--"]
    with subprocess.Popen(
        [Path(sys.executable).with_name(first), *options, *ours],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            out = launcher.stdout.readline()
            if "serve" in ours:
                url = re.search(r"http://[^/ ]+", out)[0]
                assert urllib.request.urlopen(f"{url}/health", timeout=30).status == 200
                os.killpg(launcher.pid, signal.SIGINT)
            launcher.wait(120)
            rest = launcher.stdout.read()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        code = 0 if "serve" in ours else launcher.returncode
        return Ran(code, out + rest, launcher.stderr.read())


def shell(line: str) -> Ran:
    """Run a line in a shell, where ``python`` is this one."""
    return process(["bash", "-c", f'python() {{ "{sys.executable}" "$@"; }}; {line}'], {})


def process(words: list[str], variables: dict[str, str], cwd: Path | None = None) -> Ran:
    ended = subprocess.run(
        words, env=os.environ | variables, cwd=cwd, text=True, capture_output=True, timeout=120
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


def broken_links(page: Path) -> list[str]:
    """The links of a page, and sources of its pictures, that lead nowhere within the pages."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.is_file():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(target)
    return broken
