"""The pages in docs/: their commands run, their links lead somewhere, and they build."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
import documentation
from conftest import tiny_config, write_checkpoint
from documentation import DOCS, PAGES, REPOSITORY, URL, blocks, broken_links, commands, run
from served import served
from test_generate import write_tokenizer

from glm_fused import Engine, EngineOptions, num_threads, set_num_threads
from glm_fused.serve import server as serving

# Why a block may not run here, and how many of each there may be.
NO_RUN = {"installs": 3, "takes minutes": 5, "needs claude": 1, "downloads a task": 1}
REMARKS = re.compile(rf"|no-run: ({'|'.join(NO_RUN)})|same output|exit 2")
NOT_RUN = [(p, b) for p in PAGES for b in blocks(p) if b.remark.startswith("no-run")]

# Pages whose commands take too long for every run of the tests.
SLOW = ("develop", "tune", "verify")
COMMANDS = [
    pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in PAGES
]

# What a command's output has to have: a pattern of the command, and one of its output.
SAYS = {
    r"^glm-fused demo\b": "bit-identical: yes",
    r"--ab\b": "bit-identical: yes",
    r"\bdoctor$": r"ok +fused equals reference",
    r"doctor --model": r"runs +with all of it in memory",
    r"doctor --hosts": r"gather .*outputs\n(.*\n)+link +\d+ µs",
    r"^glm-fused plan": "tokens/s at most",
    r"mlx.launch .* serve": r"demo: http://127\.0\.0\.1:\d+/v1 \(",
    r"inspect": r"layers +a token",
    r"inspect .*--memory-budget": r"slots .*for experts\ntotal",
    r"selftest": "self-test passed",
    r"sidecar verify": r"\bok\n",
    r"replay": r"optimum +0\.\d+",
    r"profile": r"router, experts",
    r"profile .*--verify": r"4 tokens after",
    r"glm-fused chat": r"\n.*\n",
    r"curl .*health": '"status":"ok"',
    r"curl .*completions": '"finish_reason":"length"',
    r"curl .*stats": '"prompt_cache"',
    r"curl .*metrics": r"# TYPE \w+",
    r"pytest": r"\d+ passed",
}


@pytest.fixture(scope="module")
def server():
    with (
        Engine("demo", EngineOptions(prompt_cache="64MiB")) as engine,
        served(engine, names=("glm-5.2", "demo")) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A checkpoint that is not quantized, which the bundled model is."""
    folder = tmp_path_factory.mktemp("floats")
    write_checkpoint(folder, tiny_config())
    write_tokenizer(folder)
    return folder


@pytest.fixture
def reader(monkeypatch, tmp_path, floats):
    """A folder of a reader's own; a list of what each server answered that a command started."""
    for name in ("GLM_FUSED_REFERENCE", "GLM_FUSED_DEBUG", "GLM_FUSED_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setitem(documentation.IN_PLACE, "FLOATS", str(floats))
    monkeypatch.setenv("GLM_FUSED_NUM_THREADS", "1")  # in processes of their own
    monkeypatch.chdir(tmp_path)
    asked = []

    class Briefly(serving.Server):
        """The command's own server, which ends once it has been asked how it is."""

        async def startup(self, sockets=None):
            await super().startup(sockets)
            threading.Thread(target=self.ask, args=(serving.url(sockets[0]),)).start()

        def ask(self, url):
            try:
                asked.append([status(f"{url}{path}") for path in ("/health", "/v1/models")])
            finally:
                self.should_exit = True

    monkeypatch.setattr("glm_fused.serve.log.set_up", lambda *args: None)
    monkeypatch.setattr(serving, "Server", Briefly)
    threads = num_threads()
    set_num_threads(1)  # the bundled model gains little from more
    yield asked
    set_num_threads(threads)


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def check(line, ran, asked, code=0):
    """Hold a command to its exit code, and to what it has to say."""
    assert ran.code == code, (line, ran)
    if code:
        assert len(ran.err.splitlines()) == 1 and "error" in ran.err, ran
        return
    short = " ".join([line.split("#")[0].strip(), *documentation.SHORTER.get(line.split()[1], [])])
    for command, pattern in SAYS.items():
        if re.search(command, short):
            assert re.search(pattern, ran.out), (line, pattern, ran)
    if "generate" in line:
        assert ran.out.strip(), (line, ran)
    if "serve" in shlex.split(line) and not line.startswith("mlx.launch"):
        assert asked.pop() == [200, 401 if "--api-key-file" in line else 200]
        assert "/v1 (" in ran.out


def in_order(expected, out):
    """Whether ``out`` has all these lines, one after the other, whatever is between them."""
    lines = iter(out.splitlines())
    return all(line in lines for line in expected.splitlines())


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page_run(page, reader, server):
    before = []
    for block in blocks(page):
        if block.language == "text":
            assert any(in_order(block.text, ran.out) for ran in before), block
        if block.language != "sh" or block.remark.startswith("no-run"):
            continue
        before = []
        for line in commands(block):
            before.append(run(line, server.url))
            check(line, before[-1], reader, code=2 if block.remark == "exit 2" else 0)
        if block.remark == "same output":
            assert len(before) > 1 and len({ran.out for ran in before}) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, reader, server, capsys):
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            before = capsys.readouterr().out
            source = "\n" * block.line + block.text.replace(URL, server.url)
            exec(compile(source, page, "exec"), names)
            if "print" in block.text:
                assert capsys.readouterr().out.strip(), (block, before)
    if page.stem == "agent":
        assert names["call"].function.name == "get_weather"
        assert json.loads(names["call"].function.arguments)["town"] in ("Oslo", "Rome", "Lima")
        assert names["report"]["kind"] in ("sun", "rain")
        assert names["message"].usage.output_tokens > 0 and names["final"]


def test_blocks_that_do_not_run_say_why_and_are_few():
    for page in PAGES:
        for block in blocks(page):
            assert REMARKS.fullmatch(block.remark), (page.name, block)
            assert block.language in ("sh", "python", "text"), (page.name, block)
    reasons = [block.remark.removeprefix("no-run: ") for _, block in NOT_RUN]
    assert {reason: reasons.count(reason) for reason in NO_RUN} == NO_RUN


def test_commands_that_do_not_run_name_what_is_there():
    named = 0
    for _, block in NOT_RUN:
        for line in commands(block):
            words = shlex.split(line, comments=True)
            files = [w for w in words if re.fullmatch(r"[\w./]+\.py|\.ci/run", w)]
            files += [w.replace(".", "/") for w in words if w.startswith("tests.")]
            for name in files:
                found = (REPOSITORY / name, REPOSITORY / f"{name}.py")
                assert any(path.exists() for path in found), line
            named += len(files)
    assert named >= 5


@pytest.mark.parametrize(
    "line", ["rm -r PATH", "glm-fused generate --model PATH --no-such-option", "glm-fused nothing"]
)
def test_what_cannot_run_is_found(reader, server, line):
    with pytest.raises((AssertionError, ValueError)):
        check(line, run(line, server.url), reader)


def test_all_links_resolve(tmp_path):
    assert {page.name: broken_links(page) for page in PAGES if broken_links(page)} == {}
    page = tmp_path / "page.md"
    page.write_text("# A b\n[a](#a-b) [b](#b) [c](c.md) ![d](d.png) [e](https://e.example)\n")
    assert broken_links(page) == ["#b", "c.md", "d.png"]


def test_every_page_is_in_the_contents_and_has_the_state():
    contents = (REPOSITORY / "properdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f": {page.name}\n" in contents
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert re.search(r"othing (here )?has run on a (real )?Mac yet|has run on a Mac yet", text)


def test_the_site_builds_and_asks_nobody_else_for_anything(tmp_path):
    if not all(map(importlib.util.find_spec, ("properdocs", "properdocs_theme_mkdocs"))):
        pytest.skip("needs glm-fused[docs]")
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", tmp_path]
    built = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        html = Path(tmp_path, name).read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//", html) == []
        assert html.count("<pre>") == len(blocks(page))
    assert (tmp_path / "images").is_dir() and DOCS.is_dir()
