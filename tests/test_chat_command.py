"""``glm-fused chat``: in a pipe, and in a terminal that keys are pressed in."""

import io
import json
import os
import re
import signal
import stat
import sys

import pexpect
import pytest

import glm_fused
from glm_fused.cli import chat_loop, main
from glm_fused.serve.answers import Reasoning, Text

N = 12  # tokens of an answer
FIRST, SECOND = "def main(path):\n    ", "import json\n"


@pytest.fixture(scope="module")
def engine():
    with glm_fused.Engine("demo") as engine:
        yield engine


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    """Histories are the test's own, and so is the current folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def piped(capsys, monkeypatch, text, *options):
    """Run the command on stdin's ``text``; returns exit code, stdout, stderr."""
    stdin = io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text))
    monkeypatch.setattr(sys, "stdin", stdin)
    code = main(["chat", "--model", "demo", "--max-tokens", str(N), "--temp", "0", *options])
    return code, *capsys.readouterr()


def answers(engine, *messages, n=N):
    """What the model says to each message, every conversation from its beginning."""
    chat, said = [], []
    for message in messages:
        chat.append({"role": "user", "content": message})
        said.append(engine.generate(chat, max_tokens=n, temp=0.0).text)
        chat.append({"role": "assistant", "content": said[-1]})
    return said


def test_a_pipe_has_the_answers_alone(capsys, monkeypatch, engine, tmp_path):
    lines = "def main(path):\\\n    \n\nimport json\\\n\n"
    first, second = answers(engine, FIRST, SECOND)
    expected = f"{first}\n{second}\n"
    assert piped(capsys, monkeypatch, lines) == (0, expected, "")
    assert not (tmp_path / "state").exists()
    (other,) = answers(engine, SECOND)
    assert other != second  # the second depends on the first
    reset = lines.replace("\n\n", "\n/reset\n", 1)
    assert piped(capsys, monkeypatch, reset) == (0, f"{first}\n{other}\n", "")


def test_what_a_pipe_cannot_have(capsys, monkeypatch):
    def refused(text, message, out=""):
        code, found, err = piped(capsys, monkeypatch, text)
        assert (code, found, err.count("\n")) == (2, out, 1)
        assert err.startswith("glm-fused: error: ")
        assert message in err

    refused("/frobnicate x\n", "'/frobnicate' is no command")
    refused("/reset now\n", "/reset takes nothing after it, found 'now'")
    refused("/save\n", "/save: expected a file")
    refused("/load\n", "/load: expected a file")
    refused("/load none.json\n", "none.json")
    refused("/save none/chat.json\n", "none does not exist, to write chat.json into")
    refused("x = 1 " * 9000 + "\n", "expected 1 to 8191")
    refused(b"\xff\xfe\n", "stdin is not valid UTF-8")
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--model", "demo"]) == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_a_model_without_a_template(capsys, monkeypatch, tmp_path):
    from conftest import tiny_config, write_checkpoint
    from test_generate import write_tokenizer

    write_checkpoint(tmp_path / "model", tiny_config())
    write_tokenizer(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    assert main(["chat", "--model", str(tmp_path / "model")]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_save_and_load(capsys, monkeypatch, engine, tmp_path):
    (first,) = answers(engine, "x = [")
    text = '/system """Lists.""" \n/save empty.json\nx = [\n/save chat.json\n'
    code, out, err = piped(capsys, monkeypatch, text)
    assert code == 0
    assert "chat.json: 3 messages." in err
    saved = json.loads((tmp_path / "chat.json").read_text())
    system = {"role": "system", "content": '"""Lists."""'}
    said = engine.generate(
        [system, {"role": "user", "content": "x = ["}], max_tokens=N, temp=0.0
    ).text
    assert out == f"{said}\n" != f"{first}\n"
    user, assistant = {"role": "user", "content": "x = ["}, {"role": "assistant", "content": said}
    assert saved == {"messages": [system, user, assistant]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat.json", "empty.json"]
    # Going on elsewhere is going on here.
    _, both, _ = piped(capsys, monkeypatch, text + "y = (\n")
    code, later, _ = piped(capsys, monkeypatch, "y = (\n", "--load", "chat.json")
    assert (code, out + later) == (0, both)
    code, later, _ = piped(capsys, monkeypatch, "/load chat.json\n/system\ny = (\n")
    assert (code, out + later != both) == (0, True)


def test_a_save_that_fails_leaves_what_was_there(capsys, monkeypatch, tmp_path):
    (tmp_path / "chat.json").write_text("before")

    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    assert piped(capsys, monkeypatch, "/save chat.json\n")[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
    assert (tmp_path / "chat.json").read_text() == "before"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "messages are None, expected a list"),
        ('{"messages": ["hi"]}', "message 0 is 'hi', expected a role and a content"),
        ('{"messages": [{"role": "user"}]}', "expected a role and a content"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "has the role 'tool'"),
        ('{"messages": [{"role": [], "content": "x"}]}', "has the role []"),
        ('{"messages": [{"role": "user", "content": 5}]}', "has the content 5, expected a text"),
        ('{"messages": [{"role": "user", "content": "", "tools": []}]}', "has 'tools'"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}',
            "message 1 has the role 'system', expected one of system, user, assistant, and",
        ),
    ],
)
def test_what_is_no_saved_chat(tmp_path, document, message):
    file = tmp_path / "chat.json"
    file.write_text(document)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        chat_loop.read_messages(file)
    assert str(file) in str(error.value)


def test_stats_count_only_new_tokens(capsys, monkeypatch, engine):
    long = "x = 1 # " + "one, two, " * 60
    text = f"{long}\n/stats\ny = 2\n/stats\n/reset\n{long[:200]}\n/stats\n"
    code, _, err = piped(capsys, monkeypatch, text)
    assert code == 0
    found = [
        [int(n) for n in numbers]
        for numbers in re.findall(r"(\d+) tokens: (\d+) cached, (\d+) processed", err)
    ]
    prompt, said = len(engine.encode(long)), len(answers(engine, long)[0])
    assert said
    assert found[0] == [prompt, 0, prompt]
    assert found[1][0] == sum(found[1][1:])
    assert prompt <= found[1][1] <= prompt + N
    assert found[1][2] <= len(engine.encode("y = 2")) + N
    assert found[2][1] > 0.8 * found[2][0]  # what was there before the reset is there still
    assert f"generated   {N} tokens" in err
    assert "of 8192 tokens" in err


def test_help(capsys, monkeypatch):
    code, out, err = piped(capsys, monkeypatch, "/help\n/quit\nnever answered\n")
    assert (code, out) == (0, "")
    assert all(f"{name} " in err for name in chat_loop.COMMANDS)


class Scripted:
    """A screen with messages to come, which keeps what it is shown."""

    interactive = False

    def __init__(self, *texts):
        self.texts, self.shown, self.notes = texts, [], []

    def messages(self):
        yield from self.texts

    def show(self, part):
        self.shown.append(part)

    def end(self):
        self.shown.append(None)

    def note(self, text):
        self.notes.append(text)


def test_thinking_is_told_from_the_answer(monkeypatch, engine):
    """Of a model that thinks: its marks are any texts here, as the bundled one has none."""
    (text,) = answers(engine, FIRST, n=40)
    start, end = text[4:7], text[-9:-6]
    assert text.count(start) >= 1
    for name, value in (("has_thinking", True), ("think_start", start), ("think_end", end)):
        monkeypatch.setattr(type(engine.tokenizer), name, value)
    screen = Scripted(FIRST)
    how = glm_fused.generation.options.Options(max_tokens=40)
    chat = chat_loop.Chat(engine, how, screen)
    chat.run()
    shown = [part for part in screen.shown if part is not None]
    before, _, rest = text.partition(start)
    thought = rest.partition(end)[0]
    assert "".join(part.text for part in shown if isinstance(part, Reasoning)).startswith(thought)
    said = chat.messages[-1]
    assert said["reasoning_content"].startswith(thought)
    assert said["content"].startswith(before)
    assert start not in said["content"][: len(before)]
    assert thought


def test_a_prompt_may_have_opened_the_thinking(monkeypatch, engine):
    tokens = engine.encode([{"role": "user", "content": "so [think]\n"}])
    screen, how = Scripted(FIRST), glm_fused.generation.options.Options(max_tokens=40)
    for start, kind in (("[think]", Reasoning), ("[other]", Text)):
        marks = (("has_thinking", True), ("think_start", start), ("think_end", "[/think]"))
        for name, value in marks:
            monkeypatch.setattr(type(engine.tokenizer), name, value)
        parser = chat_loop.Chat(engine, how, screen)._parser(tokens)
        assert parser.feed_text("well[/think]x") == [kind("well"), Text("x")]


# A terminal


class Keys:
    """The command in a terminal; ``screen`` collects what it shows."""

    def __init__(self, *options, max_tokens=N):
        arguments = ["-m", "glm_fused", "chat", "--model", "demo", "--temp", "0"]
        arguments += ["--max-tokens", str(max_tokens), *options]
        environment = os.environ | {
            "TERM": "xterm-256color",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody answers where the cursor is
        self.child = pexpect.spawn(
            sys.executable, arguments, env=environment, encoding="utf-8", timeout=90,
            dimensions=(40, 100), echo=False,
        )  # fmt: skip
        self.child.delaybeforesend = None

    def expect(self, pattern):
        self.child.expect(pattern)
        return plain(self.child.before)

    def ready(self):
        """Wait for the prompt."""
        return self.expect(r"\x1b\[\?2004h.*\x1b\[\?25h")

    def send(self, text):
        self.child.send(text)

    def end(self):
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def plain(text):
    """A terminal's text without what moves its cursor or sets its colours."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b[=>78]", "", text)


def says(text):
    """A pattern of an answer's first line, as the terminal shows it."""
    return re.escape(next(line for line in text.split("\n") if line.strip()).strip())


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="of terminals")


def test_a_terminal(engine, tmp_path):
    """Multi-line input, commands, history; Ctrl-D leaves."""
    keys = Keys()
    keys.ready()
    first, second = answers(engine, FIRST, SECOND)
    keys.send("def main(path):\\\r    \\")
    keys.send("\x7f\r")  # the backslash is taken back, and Enter sends
    keys.expect(says(first))
    keys.ready()
    keys.send("import json\x1b\r\r")  # Alt-Enter
    keys.expect(says(second))
    keys.ready()
    keys.send("/stats\r")
    keys.expect(r"(\d+) tokens: (\d+) cached, (\d+) processed")
    total, cached, new = (int(n) for n in keys.child.match.groups())
    assert total == cached + new
    assert cached > new
    keys.ready()
    keys.send("/no\r")
    keys.expect("error: '/no' is no command")
    keys.ready()
    keys.send("\x04")
    assert keys.end() == 0
    history = tmp_path / "state" / "glm-fused" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+def main(path):\n+    " in history.read_text()
    again = Keys("--system", '"""A script."""')
    again.ready()
    again.send("\x1b[A\x1b[A")  # up to the command before the last
    again.expect("/stats")
    again.send("\x04\x03\x04")  # Ctrl-D does nothing in a text, Ctrl-C forgets it
    assert again.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    keys = Keys("--no-history", max_tokens=6000)
    keys.ready()
    keys.send("import os\r")
    keys.expect("\n.*\n.*\n")  # it answers
    keys.child.kill(signal.SIGINT)
    keys.ready()
    keys.send("/save chat.json\r")
    keys.expect("2 messages")
    said = json.loads((tmp_path / "chat.json").read_text())["messages"][1]["content"]
    assert said
    keys.ready()
    keys.send("/stats\r")
    keys.expect(r"generated +(\d+) tokens.*\(stopped\)")
    assert int(keys.child.match[1]) < 6000
    keys.ready()
    keys.send("half a mess\x03")
    keys.ready()
    keys.send("\x03")
    keys.expect("once more, or Ctrl-D, leaves")
    keys.ready()
    keys.send("/reset\r")  # whoever goes on has not asked to leave
    keys.ready()
    keys.send("\x03")
    keys.expect("once more")
    keys.ready()
    keys.send("\x03")
    assert keys.end() == 0
    assert not (tmp_path / "state").exists()


def test_what_a_model_writes_does_not_steer_the_terminal(capsys, monkeypatch):
    from glm_fused.cli.chat_screen import Terminal

    class Session:
        def __init__(self, **options):
            pass

    monkeypatch.setattr("prompt_toolkit.PromptSession", Session)
    screen = Terminal([], None)
    screen.show(Text("\n\na\x1b]0;title\x07b\rc\x9b2Jd\te [bold]f[/bold] :smile:\n"))
    screen.end()
    out = capsys.readouterr().out
    assert out == "a␛]0;title␇b␍c�2Jd\te [bold]f[/bold] :smile:\n\n"
