"""Headless Chromium for tests of the live page."""

from __future__ import annotations

import shutil

import pytest

EXECUTABLE = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def launch():
    """Chromium, driven by playwright; skips the test where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if EXECUTABLE is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    return playwright.sync_playwright()


class Watched:
    """A page of a browser, and what it complains of.

    Attributes:
        page: playwright's.
        complaints: errors and warnings of its console, and exceptions.
    """

    def __init__(self, browser, url: str, size=(1280, 800), **context):
        width, height = size
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(viewport=viewport, **context)
        self.page, self.complaints = self.context.new_page(), []
        self.page.set_default_timeout(60_000)  # of a busy machine
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def _heard(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def say(self, text: str, *, wait: bool = True) -> None:
        """Write a message, send it, and wait until its answer has ended."""
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")
        if wait:
            self.page.wait_for_selector("#send:visible")

    def last(self, selector: str = ".text") -> str:
        """The text of a part of the last answer."""
        return self.page.locator(".assistant").last.locator(selector).last.inner_text()

    def overflow(self) -> int:
        """By how many pixels the document is wider than what is seen."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def focused(self) -> str:
        """The id, or else the label or text, of what has the focus."""
        return self.page.evaluate(
            "(e => e.id || e.ariaLabel || e.textContent)(document.activeElement)"
        )
