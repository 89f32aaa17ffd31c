"""Takes the pictures of the live page in docs/images: `python -m tests.page_pictures`.

They are of the real server with the bundled model, half of whose experts are streamed, while
other clients have texts written too. Needs Chromium and a machine without other work.
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from chromium import EXECUTABLE, Watched, launch
from served import served

from glm_fused import Engine, EngineOptions

FOLDER = Path(__file__).parents[1] / "docs" / "images"
SIZES = {"desktop": (1280, 960), "phone": (390, 844)}
MOST_BYTES = 150_000
OTHERS = 2  # clients
SETTINGS = {"max_tokens": "64", "temperature": "0.7", "seed": "3"}
PROMPTS = (
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""',
    "class Tree:\n    def __init__(self, left, right):",
)


def keep_busy(server, stop: threading.Event, seed: int) -> None:
    """Have texts of any length continued, one after the other, with pauses."""
    draw = random.Random(seed)
    while not stop.wait(draw.uniform(0.1, 0.6)):
        text = "def f(x):\n    return x\n" * draw.randrange(1, 40)
        message = {"role": "user", "content": text}
        body = {"model": "demo", "messages": [message], "max_tokens": draw.randrange(200, 600)}
        server.post("/v1/chat/completions", body | {"temperature": 0.8})


def take(shown: Watched, name: str) -> None:
    """A conversation with the model, and its picture."""
    page = shown.page
    page.click("#open-settings")
    for field, value in SETTINGS.items():
        page.fill(f"[name={field}]", value)
    page.select_option("[name=format]", "plain")
    page.click("text=Save")
    for prompt in PROMPTS:
        shown.say(prompt)
    page.wait_for_timeout(1500)
    save(page, name)
    if name.startswith("phone"):
        page.click(".views [data-view=live]")
        page.wait_for_timeout(1500)
        page.locator("#experts-scale").scroll_into_view_if_needed()
        save(page, f"{name}-live")


def save(page, name: str) -> None:
    """Raises ValueError for a picture that is too large for the repository."""
    data = page.screenshot()
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name}: {len(data)} bytes, expected at most {MOST_BYTES}.")
    (FOLDER / f"page-{name}.png").write_bytes(data)


def main() -> None:
    """Take all pictures, and fail where the page complains."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    options = EngineOptions(slots=8, context=4096, prompt_cache="16MiB")
    with Engine("demo", options) as engine, served(engine) as server, launch() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE)
        others = [
            threading.Thread(target=keep_busy, args=(server, stop, seed)) for seed in range(OTHERS)
        ]
        for other in others:
            other.start()
        try:
            stop.wait(20)  # so that the chart of the last minutes has something to show
            for name, size in SIZES.items():
                for scheme in ("light", "dark"):
                    shown = Watched(browser, server.url, size, color_scheme=scheme)
                    take(shown, f"{name}-{scheme}")
                    shown.context.close()
                    if shown.complaints:
                        raise ValueError(f"{name}, {scheme}: {shown.complaints}")
        finally:
            stop.set()
            for other in others:
                other.join()


if __name__ == "__main__":
    main()
