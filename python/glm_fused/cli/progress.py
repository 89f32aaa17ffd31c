"""Shows bars where stderr is a terminal, and nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self


class Progress:
    """A bar for what is being done, called with its name, the tokens done and their total.

    The bar's clock goes on between calls, because one chunk of a prompt can take minutes.
    """

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._what = ""
        self._bar: Any = None
        self._done, self._lock = threading.Event(), threading.Lock()
        self._clock = threading.Thread(target=self._tick, name="glm-fused-bar", daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._what != what:
            self._close()
            self._open(what, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._close()

    def __enter__(self) -> Self:
        if self._shown:
            self._clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._shown:
            self._clock.join()
        self._close()

    def _open(self, what: str, total: int) -> None:
        from tqdm import tqdm

        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tokens, {elapsed}"
        self._what = what
        self._bar = tqdm(
            total=total, desc=what, leave=False, file=sys.stderr, bar_format=layout, mininterval=0.1
        )

    def _close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = None

    def _tick(self) -> None:
        while not self._done.wait(1.0):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Give the block a function that shows on a terminal what is being done, from then on."""
    bar: Any = None

    def show(what: str) -> None:
        nonlocal bar
        if bar is None:
            from tqdm import tqdm

            hidden = not sys.stderr.isatty()
            bar = tqdm(bar_format="{elapsed} {desc}", disable=hidden, leave=False)
        bar.set_description_str(what)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
