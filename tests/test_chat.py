"""Chat templates are programs of strangers: each failure is one error that names the file."""

import json
import re
import threading
import time

import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import write_tokenizer

from glm_fused.cli import main
from glm_fused.generation import chat
from glm_fused.loader import load

MESSAGES = [{"role": "user", "content": "w1 w2"}]
TEMPLATES = {
    "{{ raise_exception('no system role') }}": "fails: no system role",
    "{{ messages[0]['tools']['x'] }}": "fails: 'dict object' has no attribute 'tools'",
    "{% for %}": "fails: Expected an expression",
    "{{ 1 | none_such }}": "fails: No filter named 'none_such'",
    "{% include 'other' %}": "fails: TypeError: no loader",
    "{{ 1 + 'a' }}": "fails: TypeError: unsupported operand",
    "{{ 1 / 0 }}": "fails: ZeroDivisionError: division by zero",
    "{{ ''.__class__.__mro__ }}": "fails: access to attribute '__class__'",
    "{% for i in range(10 ** 9) %}x{% endfor %}": "fails: OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "fails: RecursionError",
    "{{ 'x' * 10 ** 17 }}": "fails: (MemoryError|OverflowError)",
    "{{ 2 ** 100000 }}": "fails: Exceeds the limit",
    "{{ 'x' * 2000000 }}": "makes 2000000 characters of 6, expected at most 1000024",
    "{{ '\\ud800' }}": "renders what the tokenizer does not take",
    "{{ nothing }}": "renders nothing",
    "": "renders nothing",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, tiny_config())
    write_tokenizer(folder)
    return folder


def with_template(folder, template):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": template}))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails(capsys, folder, template):
    (folder / "chat_template.jinja").write_text(template)
    assert main(["generate", "--model", str(folder), "--prompt", "w1", "--max-tokens", "1"]) == 2
    out, err = capsys.readouterr()
    (folder / "chat_template.jinja").unlink()
    start = f"glm-fused: error: [chat] the chat template in {folder / 'chat_template.jinja'} "
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(start)
    assert re.match(TEMPLATES[template], err[len(start) :])


@pytest.mark.parametrize("template", [5, True, [], {"other": "x"}, [{"name": "x", "template": 1}]])
def test_what_is_no_template(capsys, folder, template):
    with_template(folder, template)
    assert main(["generate", "--model", str(folder), "--prompt", "w1", "--max-tokens", "1"]) == 2
    out, err = capsys.readouterr()
    with_template(folder, None)
    assert (out, err.count("\n")) == ("", 1)
    assert str(folder) in err


@pytest.mark.parametrize("threaded", [False, True])
def test_a_template_that_does_not_end_is_stopped(monkeypatch, folder, threaded):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    loop = "{% for i in range(100000) %}"
    with_template(folder, loop * 3 + "{% endfor %}" * 3)
    _, tokenizer = load(folder)
    with_template(folder, None)
    errors = []

    def render():
        with pytest.raises(ValueError, match=r"stopped after 0\.3 s") as error:
            chat.render(tokenizer, MESSAGES)
        errors.append(error.value)
        time.sleep(0.2)  # nothing comes after it

    if threaded:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join(20)
    else:
        render()
    assert len(errors) == 1


def test_a_template_that_takes_all_memory_is_stopped(monkeypatch, folder):
    monkeypatch.setattr(chat, "GROWTH_BYTES", 50_000_000)
    loop = "{% for i in range(100000) %}{{ 'x' * 10000 ~ i }}{% endfor %}"
    with_template(folder, loop)
    _, tokenizer = load(folder)
    with_template(folder, None)
    with pytest.raises(ValueError, match=r"stopped after .*MB"):
        chat.render(tokenizer, MESSAGES)


def test_a_template_that_works_gives_transformers_tokens(folder):
    with_template(folder, "w7 {% for m in messages %}{{ m.content }}{% endfor %} w8")
    _, tokenizer = load(folder)
    with_template(folder, None)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert chat.render(tokenizer, MESSAGES) == list(expected) == [7, 1, 2, 8]
