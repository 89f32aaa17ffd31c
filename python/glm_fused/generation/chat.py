"""A prompt within the model's chat template, which is a program that came with the checkpoint."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..foreign import foreign
from ..memory import resident_bytes, size

SECONDS = 10.0  # usual templates take milliseconds
GROWTH_BYTES = 2 << 30
MAX_ADDED = 1_000_000  # a chat may have so many characters and four times the messages' own


def render(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens of a chat, whose messages are ``{"role", "content"}``, in the chat template.

    Raises ValueError, naming the template's file and what it said, for a template that fails, does
    not end, or gives nothing or far more than a prompt.
    """
    return rendered_tokens(tokenizer, render_text(tokenizer, messages))


def render_text(
    tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], **arguments: Any
) -> str:
    """The text of a chat in the chat template, which gets the ``arguments``, such as ``tools``.

    Raises ValueError as `render` does.
    """
    where = f"[chat] the chat template in {_file(tokenizer)}"
    apply = cast(Callable[..., str], tokenizer.apply_chat_template)
    given = sum(len(str(value)) for message in messages for value in message.values())
    given += sum(len(str(value)) for value in arguments.values())
    with foreign(f"{where} fails"), _limited():
        text = apply(list(messages), add_generation_prompt=True, tokenize=False, **arguments)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where} renders nothing.")
    if len(text) > 4 * given + MAX_ADDED:
        raise ValueError(
            f"{where} makes {len(text)} characters of {given}, expected at most"
            f" {4 * given + MAX_ADDED}."
        )
    return text


def rendered_tokens(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """The tokens of a text that `render_text` gave; raises ValueError where there are none."""
    where = f"[chat] the chat template in {_file(tokenizer)}"
    with foreign(f"{where} renders what the tokenizer does not take"):
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _file(tokenizer: TokenizerWrapper) -> Path:
    """Where the template comes from; the order of precedence is transformers'."""
    folder = Path(str(tokenizer.name_or_path))
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    return next((folder / name for name in names if (folder / name).is_file()), folder)


class _Excess(BaseException):
    """Passes through templates and the code that runs them, which catch Exception."""


@contextmanager
def _limited() -> Iterator[None]:
    """Interrupt the block where it takes too long or too much memory, and raise ValueError.

    Another thread watches it, because signals reach the main thread alone. One step of Python
    cannot be interrupted, so a single huge string ends in a MemoryError or a text that is too long.
    """
    thread, lock, done = threading.get_ident(), threading.Lock(), threading.Event()
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc
    before, reasons = resident_bytes(), list[str]()

    def watch() -> None:
        waited = 0.0
        while not done.wait(0.05):
            waited += 0.05
            grown = resident_bytes() - before
            if waited < SECONDS and grown < GROWTH_BYTES:
                continue
            took = f"{SECONDS:g} s" if waited >= SECONDS else size(grown)
            with lock:
                if not done.is_set():
                    reasons.append(f"stopped after {took}")
                    raised(ctypes.c_ulong(thread), ctypes.py_object(_Excess))
            return

    threading.Thread(target=watch, name="glm-fused-chat", daemon=True).start()
    try:
        try:
            yield
        finally:
            with lock:
                done.set()
                raised(ctypes.c_ulong(thread), None)  # takes back what is on its way
    except _Excess:
        raise ValueError(reasons[0]) from None
