"""The live page in headless Chromium, before a server whose model is a script."""

from __future__ import annotations

import json
import random
import re
import socket

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from chromium import Watched, launch
from page_server import HOSTILE, Script, create_app, example_stats, running

DESKTOP, PHONE = (1280, 800), (390, 844)
LOOKS = [(size, scheme) for size in (DESKTOP, PHONE) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser():
    with launch() as playwright:
        from chromium import EXECUTABLE

        browser = playwright.chromium.launch(executable_path=EXECUTABLE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    script = Script()
    with running(create_app(script)) as url:
        script.url = url
        yield script


@pytest.fixture
def open_page(browser, server):
    """Opens the page; what its console complains of, unless expected, fails the test."""
    server.key, server.stats, server.bodies, server.cancelled = None, example_stats, [], 0
    opened = []

    def open_one(*args, **context) -> Watched:
        opened.append(Watched(browser, server.url, *args, **context))
        return opened[-1]

    yield open_one
    for one in opened:
        one.context.close()
        assert one.complaints == []


@pytest.fixture
def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.fixture
def shown(open_page):
    return open_page()


def refused(shown: Watched, status: int) -> None:
    """Take back what browsers themselves write to the console of a response that is an error."""
    found = [text for text in shown.complaints if f"status of {status}" in text]
    assert found
    shown.complaints[:] = [text for text in shown.complaints if text not in found]


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_a_round_trip_at_every_size_and_in_both_colours(open_page, size, scheme):
    shown = open_page(size, color_scheme=scheme)
    page = shown.page
    assert page.is_visible("#empty") and page.inner_text("#model") != ""
    shown.say("markdown")
    assert page.locator(".assistant pre").inner_text().startswith("def area(width, height):\n    #")
    assert page.locator(".assistant :is(strong, em, table, ol)").count() == 4
    assert re.search(r"^\d+ tokens · .* tokens/s · .* \(1,792 cached\)", shown.last(".numbers"))
    assert shown.overflow() <= 0
    red = page.evaluate("getComputedStyle(document.querySelector('.chat')).backgroundColor")
    assert (int(red[4:].split(",")[0]) > 128) == (scheme == "light")
    page.click("#open-settings")
    assert shown.overflow() <= 0
    page.keyboard.press("Escape")
    if size == PHONE:
        assert not page.is_visible("#live")
        page.click(".views [data-view=live]")
        assert page.is_visible("#live") and not page.is_visible("#chat")
    assert page.is_visible("#speed-chart polyline") and shown.overflow() <= 0


def test_a_wide_answer_scrolls_by_itself_on_a_phone(open_page):
    shown = open_page(PHONE)
    shown.say("x" * 3000)
    assert shown.overflow() <= 0
    wide = "document.querySelector('#messages').append(Object.assign(document.createElement('p'),"
    shown.page.evaluate(f"{wide} {{textContent: 'x', style: 'width: 2000px'}}))")
    log = shown.page.evaluate(
        "(e => e.scrollWidth - e.clientWidth)(document.getElementById('log'))"
    )
    assert log > 0  # the control: what is too wide is seen where it can be


def test_thinking_is_open_until_the_answer_comes(shown, server):
    page = shown.page
    page.evaluate("""() => {
        window.states = [];
        new MutationObserver(() => {
            const details = document.querySelector(".thinking");
            const text = document.querySelector(".assistant > .text").textContent;
            if (details && !details.hidden) window.states.push([details.open, text !== ""]);
        }).observe(document.getElementById("messages"), {subtree: true, childList: true});
    }""")
    shown.say("think")
    states = page.evaluate("window.states")
    assert [True, False] in states and [False, True] in states and [True, True] not in states
    thought = page.locator(".thinking .text")
    assert not thought.is_visible()
    page.click(".thinking summary")
    assert thought.inner_text().startswith("First I look at what is asked.")
    shown.say("more")
    assert thought.first.is_visible()
    kept = server.bodies[-1]["messages"][1]
    assert kept["content"] == "You said think." and kept["reasoning_content"].startswith("First I")


def test_a_call_is_shown_and_its_result_goes_back(shown, server):
    page = shown.page
    shown.say("use a tool")
    assert page.inner_text(".call summary") == "Calls get_weather"
    assert page.inner_text(".call pre") == '{\n  "city": "Oslo",\n  "unit": "celsius"\n}'
    shown.say("something else", wait=False)
    assert page.inner_text("#notice-text") == "Give the results of the calls first."
    assert page.evaluate("document.activeElement.closest('.call') !== null")
    page.keyboard.type('{"celsius": 4}')
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant >> nth=1")
    page.wait_for_selector("#send:visible")
    assert len(server.bodies) == 2
    asked, call, result = server.bodies[1]["messages"]
    assert asked == {"role": "user", "content": "use a tool"}
    assert call["tool_calls"][0]["function"]["name"] == "get_weather"
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 4}'}
    assert page.locator(".call form").count() == 0 and page.locator(".call pre").count() == 2


ELEMENTS = """() => [...document.querySelectorAll("#messages *")].flatMap(element => {
    const names = element.getAttributeNames().filter(name => /^on|^src/.test(name));
    const link = element.getAttribute("href") ?? "https:";
    return [element.localName, ...names, ...(/^https?:/.test(link) ? [] : ["bad href"])];
})"""


def elements(page) -> set[str]:
    """The kinds of elements in the conversation, and the attributes that run code."""
    return set(page.evaluate(ELEMENTS))


def test_markup_of_the_model_stays_text(shown):
    page = shown.page
    shown.say("hostile")
    bad = {"img", "script", "svg", "iframe", "onerror", "onload", "srcdoc", "bad href"}
    assert not elements(page) & bad and page.evaluate("window.owned") is None
    assert '<img src=x onerror="window.owned = 1">' in shown.last()
    assert "[a](javascript:window.owned=3)" in shown.last()
    # The control: what is made of such a text is seen, and the policy keeps it from running.
    page.evaluate("text => { document.querySelector('#messages').innerHTML = text }", HOSTILE)
    page.wait_for_timeout(100)
    assert elements(page) & bad and page.evaluate("window.owned") is None
    assert any("Content Security Policy" in text for text in shown.complaints)
    shown.complaints.clear()


def test_markdown_that_grows_looks_as_what_is_drawn_at_once(shown):
    """Random texts of pieces that open and close blocks, each a little longer than the last."""
    draw = random.Random(seed := random.randrange(2**32))
    pieces = [
        "```py\n",
        "```\n",
        "~~~\n",
        "- a\n",
        "  - b\n",
        "1. c\n",
        "> d\n",
        "# e\n",
        "\n",
        "\n",
    ]
    pieces += [
        "f\n",
        "|g|h|\n",
        "|-|-|\n",
        "---\n",
        "**i** ",
        "`j` ",
        "*k* ",
        "<b>",
        "[l](https://m) ",
    ]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 25))) for _ in range(60)]
    differing = shown.page.evaluate(
        """async texts => {
            const {renderMarkdown} = await import("/page/markdown.js");
            const whole = text => {
                const node = document.createElement("div");
                renderMarkdown(node, text);
                return node;
            };
            return texts.filter(text => {
                const node = document.createElement("div");
                for (let i = 0; i <= text.length; i++) renderMarkdown(node, text.slice(0, i));
                return node.outerHTML !== whole(text).outerHTML || node.querySelector("b");
            });
        }""",
        texts,
    )
    assert differing == [], seed


def test_events_are_read_wherever_the_network_cuts_them(shown):
    draw = random.Random(seed := random.randrange(2**32))
    datas = [draw.choice(["{}", "ü 🙂 \u2028", "a", '{"a": "\\n"}', ": b"]) for _ in range(40)]
    before = [draw.choice(["", ": note", "event: x"]) for _ in datas]
    text = "".join(f"{line}\ndata: {d}\n\n" for line, d in zip(before, datas, strict=True))
    raw = text.replace("\n", draw.choice(["\n", "\r\n", "\r"])).encode()
    cuts = sorted(draw.sample(range(1, len(raw)), 60))
    parts = [list(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    found = shown.page.evaluate(
        """async parts => {
            const {events} = await import("/page/api.js");
            const stream = new ReadableStream({start(out) {
                for (const part of parts) out.enqueue(new Uint8Array(part));
                out.close();
            }});
            const found = [];
            for await (const event of events(stream)) found.push(event.data ?? null);
            return found;
        }""",
        parts,
    )
    assert [data for data in found if data is not None] == datas, seed
    assert found.count(None) == before.count(": note"), seed


def test_the_prompts_progress_is_shown_until_the_first_token(shown):
    page = shown.page
    shown.say("read a long prompt", wait=False)
    page.locator(".waiting", has_text="1,024 of 4,096 tokens, 512 of them cached").wait_for()
    assert page.evaluate("document.querySelector('.waiting progress').value") == 0.25
    page.wait_for_selector("#send:visible")
    assert not page.is_visible(".waiting")


def test_escape_stops_an_answer_and_the_server_hears_of_it(shown, server):
    page = shown.page
    shown.say("slow", wait=False)
    page.locator(".assistant > .text", has_text="word word").wait_for()
    assert page.is_visible("#stop") and not page.is_visible("#send")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert "stopped" in shown.last(".numbers") and shown.last().startswith("word word")
    assert page.inner_text("#announce") == "Stopped."
    page.wait_for_timeout(300)
    assert server.cancelled == 1
    shown.say("next")
    assert shown.last() == "You said next." and server.cancelled == 1
    shown.say("slow", wait=False)
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert "stopped" in shown.last(".numbers")


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ("refuse this", "max_tokens is 9, expected 8.", ""),
        ("fail in the midst of a long answer", "expert 7 of layer 3 cannot be read.", "You said"),
        ("cut this answer off where it is longer", "The connection ended before", "You said"),
    ],
)
def test_errors_are_shown_and_the_answer_can_be_given_again(shown, server, asked, error, text):
    shown.say(asked)
    assert shown.last(".error").startswith(error)
    assert shown.page.locator(".assistant > .text").inner_text().startswith(text)
    shown.page.click("text=Answer again")
    shown.page.wait_for_selector("#send:visible")
    assert shown.page.locator(".assistant").count() == 1 and len(server.bodies) == 2
    assert server.bodies[0]["messages"] == server.bodies[1]["messages"]
    if "refuse" in asked:
        refused(shown, 400)


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(open_page, server):
    server.key = "a secret"
    shown = open_page()
    page = shown.page
    page.wait_for_selector("#state[data-state=locked]")
    shown.say("hello")
    assert page.is_visible("#settings") and "API key is missing" in page.inner_text(
        "#settings-error"
    )
    assert page.evaluate("document.activeElement.name") == "key"
    page.keyboard.type("a secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#state[data-state=busy]")
    page.click("text=Answer again")
    page.wait_for_selector("#send:visible")
    assert shown.last() == "You said hello."
    stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert "a secret" not in stored[0] and "a secret" in stored[1]
    page.reload()
    page.wait_for_selector("#state[data-state=busy]")
    refused(shown, 401)


def test_a_reload_keeps_conversation_settings_and_theme(shown, server):
    page = shown.page
    shown.say("think")
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=max_tokens]", "64")
    page.fill("[name=stop]", "END\n###")
    page.select_option("[name=thinking]", "off")
    page.fill("[name=tools]", "{")
    page.click("text=Save")
    assert "no JSON list" in page.inner_text("#settings-error")
    page.fill("[name=tools]", '[{"type": "function", "function": {"name": "f"}}]')
    page.click("text=Save")
    page.click("#theme")
    page.reload()
    assert shown.last() == "You said think." and page.locator(".message").count() == 2
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    shown.say("again")
    body = server.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.5, 64) and "top_p" not in body
    assert body["stop"] == ["END", "###"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["tools"][0]["function"]["name"] == "f"
    page.click("#new-chat")
    assert page.is_visible("#empty") and shown.focused() == "draft"
    page.reload()
    assert page.is_visible("#empty") and page.locator(".message").count() == 0


def test_a_reload_amid_an_answer_keeps_what_came(shown):
    page = shown.page
    shown.say("slow", wait=False)
    page.locator(".assistant > .text", has_text="word word").wait_for()
    page.reload()
    assert shown.last().startswith("word word") and "cut off" in shown.last(".numbers")
    shown.say("go on")
    assert shown.last() == "You said go on."


def test_what_cannot_be_read_back_is_an_empty_conversation(shown):
    page = shown.page
    for kept in ("{", "[1]", '[{"role": "root", "content": ""}]', "null", "5"):
        for name in ("chat", "settings"):
            keep = f"localStorage.setItem('glm-fused.{name}', {json.dumps(kept)})"
            page.evaluate(keep)
        page.reload()
        assert page.is_visible("#empty"), kept
    shown.say("hello")
    assert shown.last() == "You said hello."


# How the focus is drawn: around what has it, or around all of the field for a message.
RING = """idle => {
    const at = document.activeElement;
    const field = at.id === "draft" ? at.closest(".field") : null;
    if (field) return getComputedStyle(field).borderTopColor === idle ? "none" : "border";
    return getComputedStyle(at).outlineStyle;
}"""


def test_the_keyboard_reaches_everything_and_shows_where_it_is(shown):
    page = shown.page
    idle = page.evaluate("getComputedStyle(document.querySelector('.field')).borderTopColor")
    plain, stops, rings = page.evaluate(RING, idle), [], []
    for _ in range(8):
        page.keyboard.press("Tab")
        stops.append(shown.focused())
        rings.append(page.evaluate(RING, idle))
    expected = ["Skip to the message", "new-chat", "open-settings", "theme", "log", "draft", "send"]
    assert stops == [*expected, "live"]
    assert plain not in rings, rings  # the control: what has no focus shows none
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert shown.focused() == "draft"
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant")
    page.wait_for_selector("#send:visible")
    assert shown.last() == "You said two\nlines."
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    assert page.is_visible("#settings") and page.evaluate("document.activeElement.name") == "system"
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings") and shown.focused() == "open-settings"


# The least contrast of numbers with their cells, for each rate of hits; `tones` are kept or not.
CONTRAST = """async tones => {
    const {drawHeat} = await import("/page/charts.js");
    const layers = Array.from({length: 101}, (_, i) => ({layer: i, rate: i / 100, reads: "0"}));
    const map = document.getElementById("experts-map");
    map.hidden = false;
    drawHeat(map, layers);
    const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const light = color => {
        pen.fillStyle = color;
        pen.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(
            v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    return Math.min(...[...map.children].map(cell => {
        if (!tones) cell.className = "cell";
        const style = getComputedStyle(cell);
        const [a, b] = [light(style.color), light(style.backgroundColor)];
        return Math.max(a, b) / Math.min(a, b);
    }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_maps_numbers_stand_out_at_every_rate(open_page, scheme):
    page = open_page(color_scheme=scheme).page
    assert page.evaluate(CONTRAST, True) >= 3.0
    # The control: with one colour for all, they do not in the dark.
    assert (page.evaluate(CONTRAST, False) < 2.9) == (scheme == "dark")


def test_the_numbers_are_the_servers(shown, server):
    page = shown.page
    page.wait_for_selector("#state[data-state=busy]")
    stats = example_stats(0)
    assert page.inner_text("#model") == stats["model"]
    assert page.inner_text("#speed-now") == "40.2"
    assert page.locator("#experts-map .cell").count() == len(stats["experts"]["layers"])
    assert page.locator("#experts-map .unused").count() == 1
    assert page.inner_text("#queue") == "3 of 16 running · 2 waiting"
    assert page.inner_text("#memory-total") == "93.6 GB"
    kinds = page.locator("#memory-legend .value").all_inner_texts()
    assert kinds == ["17.4 GB", "61.2 GB", "5.30 GB", "8.00 GB", "1.10 GB", "640 MB"]
    widths = page.evaluate(
        "[...document.querySelectorAll('#memory-bar rect')].map(r => +r.getAttribute('width'))"
    )
    total = sum(stats["memory"].values())
    assert widths == pytest.approx([100 * n / total for n in stats["memory"].values()], rel=1e-4)
    pairs = page.locator("#reuse dt, #reuse dd").all_inner_texts()
    kept = {label.lower(): value for label, value in zip(pairs[::2], pairs[1::2], strict=True)}
    assert kept == {
        "texts kept": "12",
        "in memory": "8.00 GB of 12.0 GB",
        "on disk": "9.00 GB of 64.0 GB",
        "requests that found a beginning": "42 of 48",
        "prompt tokens found": "81,920 of 96,000",
    }
    idle = stats | {
        "active": [],
        "queued": 0,
        "experts": None,
        "drafts": None,
        "prompt_cache": None,
    }
    server.stats = lambda seconds: idle | {"memory": {"weights": 3}, "history": []}
    page.wait_for_selector("#state[data-state=ready]")
    assert page.inner_text("#experts-none").startswith("All experts are in memory")
    assert not page.is_visible("#experts-map") and not page.is_visible("#drafts-panel")
    assert not page.is_visible("#reuse-panel")
    assert page.inner_text("#memory-total") == "3 B" and page.is_visible("#requests-none")


def test_it_finds_a_server_again_that_was_away(browser, unused_port):
    script = Script()
    with running(create_app(script), unused_port) as url:
        shown = Watched(browser, url)
        shown.page.wait_for_selector("#state[data-state=busy]")
    shown.page.wait_for_selector("#state[data-state=offline]")
    shown.say("is anyone there")
    assert shown.last(".error") == "The server cannot be reached."
    with running(create_app(script), unused_port):
        shown.page.wait_for_selector("#state[data-state=busy]")
        shown.page.click("text=Answer again")
        shown.page.wait_for_selector("#send:visible")
        assert shown.last() == "You said is anyone there."
    assert all("ERR_" in text for text in shown.complaints)
    shown.context.close()
