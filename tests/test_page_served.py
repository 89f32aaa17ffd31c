"""The live page in headless Chromium before the real server, with the bundled model."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from chromium import EXECUTABLE, Watched, launch
from served import served

from glm_fused import Engine, EngineOptions
from glm_fused.serve.conversation import Conversation
from glm_fused.serve.page import FOLDER

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def browser():
    with launch() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine():
    with Engine("demo", EngineOptions(slots=6, context=4096)) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with served(engine) as server:
        yield server


@pytest.fixture
def shown(browser, server):
    shown = Watched(browser, server.url)
    yield shown
    shown.context.close()
    assert shown.complaints == []


def configure(shown: Watched, **settings: str) -> None:
    shown.page.click("#open-settings")
    for name, value in settings.items():
        field = shown.page.locator(f"[name={name}]")
        field.select_option(value) if name == "format" else field.fill(value)
    shown.page.click("text=Save")


def test_the_answer_is_the_models(shown, engine):
    configure(shown, max_tokens="48", format="plain")
    shown.say(PROMPT)
    expected = engine.generate([{"role": "user", "content": PROMPT}], max_tokens=48)
    found = shown.page.locator(".assistant > .text").evaluate("node => node.textContent")
    assert found == expected.text and len(found) > 40
    numbers = shown.last(".numbers")
    tokens = len(engine.encode([{"role": "user", "content": PROMPT}]))
    assert re.search(rf"48 tokens · .* · prompt of {tokens}\b", numbers), numbers


def test_the_page_knows_the_comments_that_tell_of_a_prompt(server):
    script = (FOLDER / "api.js").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"const PROGRESS = /(.*)/;", script)
    message = {"role": "user", "content": PROMPT}
    body = {"model": "demo", "messages": [message], "stream": True, "max_tokens": 2}
    _, raw = server.post("/v1/chat/completions", body)
    comments = re.findall(r"^: (.*)$", raw.decode(), re.MULTILINE)
    assert comments
    for comment in comments:
        done, total, _ = map(int, re.fullmatch(pattern.replace(r"\/", "/"), comment).groups())
        assert 0 <= done <= total


def test_stop_ends_the_request_on_the_server(shown, server):
    configure(shown, max_tokens="3000")  # at none of which the text ends by itself
    before = server.service.scheduler.describe()["cancelled"]
    shown.say(PROMPT, wait=False)
    shown.page.locator(".assistant > .text:not(:empty)").wait_for()
    shown.page.keyboard.press("Escape")
    shown.page.wait_for_selector("#send:visible")
    server.idle()  # it notices a little later that nobody listens
    assert server.service.scheduler.describe()["cancelled"] == before + 1
    assert server.service.activity.describe()["active"] == []
    shown.page.wait_for_selector("#state[data-state=ready]")
    assert "stopped" in shown.last(".numbers")


def test_the_servers_refusals_are_shown(shown):
    configure(shown, temperature="1.5", max_tokens="1000000")
    shown.say(PROMPT)
    assert "1000000" in shown.last(".error").replace(",", "")
    shown.complaints[:] = [text for text in shown.complaints if "status of 400" not in text]


def test_thinking_is_shown_apart(browser, engine, monkeypatch):
    """Of a model that thinks: its marks are any texts here, as the bundled one has none."""
    message = [{"role": "user", "content": PROMPT}]
    text = engine.generate(message, max_tokens=48).text
    start, end = text[4:7], text[-9:-6]
    for name, value in (("has_thinking", True), ("think_start", start), ("think_end", end)):
        monkeypatch.setattr(type(engine.tokenizer), name, value)
    with served(engine) as server:
        shown = Watched(browser, server.url)
        configure(shown, max_tokens="48", format="plain")
        shown.say(PROMPT)
        body = {"model": "demo", "messages": message, "max_tokens": 48}
        answer = server.post("/v1/chat/completions", body)[1]["choices"][0]["message"]
        thought = shown.page.locator(".assistant .thinking")
        found = thought.locator(".text").evaluate("node => node.textContent")
        said = shown.page.locator(".assistant > .text").evaluate("node => node.textContent")
        assert found.strip() == answer["reasoning_content"].strip() and len(found) > 8
        assert said.strip() == answer["content"].strip() and start not in said[:7]
        thought.locator("summary").click()
        assert thought.locator(".text").is_visible()
        shown.context.close()
    assert shown.complaints == []


def test_a_call_of_a_tool_is_shown_and_its_result_goes_on(browser, engine, monkeypatch):
    """The bundled model does not want tools, so a grammar has it call one after each question."""
    real, asked = Conversation.prepare, []

    def constrained(self, **given):
        asked.append(given["messages"])
        choice = "none" if asked[-1][-1]["role"] == "tool" else "required"
        return real(self, **given | {"tool_choice": choice, "parallel_tool_calls": False})

    monkeypatch.setattr(Conversation, "prepare", constrained)
    town = {"enum": ["Oslo", "Rome"]}
    parameters = {"type": "object", "properties": {"town": town}, "required": ["town"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    with served(engine) as server:
        shown = Watched(browser, server.url)
        page = shown.page
        configure(shown, max_tokens="60", tools=json.dumps([tool]))
        shown.say("How warm is it?")
        call = page.locator(".assistant .call")
        assert "get_weather" in call.locator("summary").inner_text()
        assert re.search(r'"town": "(Oslo|Rome)"', call.locator("code").last.inner_text())
        call.locator("textarea").fill("21 degrees")
        call.locator("text=Give result").click()
        page.wait_for_function("document.querySelectorAll('.assistant').length === 2")
        page.wait_for_selector("#send:visible")
        assert len(shown.last()) > 10
        assert [one["role"] for one in asked[-1]] == ["user", "assistant", "tool"]
        assert asked[-1][-1]["content"] == "21 degrees"
        shown.context.close()
    assert shown.complaints == []


def test_a_layer_with_more_reads_is_paler(shown, server):
    """The map's colours are the rates that the bank has counted."""
    configure(shown, max_tokens="32")
    shown.say(PROMPT)
    shown.page.wait_for_selector("#state[data-state=ready]")
    shown.page.reload()  # so that rates are those since the start
    shown.page.locator("#experts-map .cell:not(.unused)").first.wait_for()
    banks = server.service.engine.streaming.banks
    for i, bank in banks.items():
        counts = bank.stats()
        share = counts["hits"] / (counts["hits"] + counts["misses"])
        cell = shown.page.locator(f'#experts-map .cell[title^="Layer {i}:"]')
        assert f"{counts['misses']:,} read from disk" in cell.get_attribute("title")
        drawn = cell.evaluate("node => node.style.getPropertyValue('--share')")
        assert drawn == f"{100 * share:.1f}%" and 0 < share < 1


def test_the_numbers_arrive(shown, server):
    configure(shown, max_tokens="32")
    shown.say(PROMPT)
    shown.page.wait_for_selector("#state[data-state=ready]")
    cells = shown.page.locator("#experts-map .cell:not(.unused)")
    cells.first.wait_for()
    layers = server.service.engine.streaming.banks
    assert cells.count() == len(layers)
    assert shown.page.inner_text("#model") == "demo"
    names = shown.page.locator("#memory-legend span:not(.value)").all_inner_texts()
    assert {"Weights", "Expert slots", "Program and other"} <= set(names)
    total = server.service.activity.describe()["totals"]["generated"]
    shown.page.locator("#totals dd", has_text=f"{total:,}").wait_for()


def test_a_key_opens_the_server_to_the_page(browser, engine):
    with served(engine, api_key="sesame") as server:
        shown = Watched(browser, server.url)
        shown.page.wait_for_selector("#state[data-state=locked]")
        configure(shown, key="sesame", max_tokens="8")
        shown.page.wait_for_selector("#state[data-state=ready]")
        shown.say(PROMPT)
        assert "8 tokens" in shown.last(".numbers")
        shown.context.close()
    assert all("status of 401" in text for text in shown.complaints)
