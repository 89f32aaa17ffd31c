"""Where a chat's messages come from and its answers go: a terminal, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..serve.answers import Reasoning, Said
from .output import write

# What a model writes must not move the cursor or set the terminal's title.
_HARMLESS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_HARMLESS |= {127: "\u2421"} | dict.fromkeys(range(128, 160), "\ufffd")


class Screen(Protocol):
    """What a chat reads from and shows itself on."""

    interactive: bool

    def messages(self) -> Iterator[str]:
        """The messages, one after the other, of one line or several."""
        ...

    def show(self, part: Said) -> None:
        """Show a piece of an answer."""
        ...

    def end(self) -> None:
        """The answer is over."""
        ...

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        ...


class Pipe:
    """Messages from stdin, one a line, and answers, each with a line break, on stdout.

    A line that ends with a backslash goes on in the next one. Thinking is not shown; notes go to
    stderr.
    """

    interactive = False

    def messages(self) -> Iterator[str]:
        """The messages; raises ValueError where stdin is closed or not UTF-8."""
        if sys.stdin is None:  # Python makes None of a closed stdin
            raise ValueError("stdin is closed, expected a message a line.")
        lines: list[str] = []
        try:
            for line in sys.stdin:
                text = line.rstrip("\r\n")
                lines.append(text.removesuffix("\\"))
                if not text.endswith("\\"):
                    yield "\n".join(lines)
                    lines = []
        except UnicodeDecodeError:
            raise ValueError("stdin is not valid UTF-8.") from None
        if lines:
            yield "\n".join(lines)

    def show(self, part: Said) -> None:
        if not isinstance(part, Reasoning):
            write(part.text)

    def end(self) -> None:
        write("\n")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


class Terminal:
    """A line editor with a history, and answers in colour where the terminal has any.

    Args:
        commands: texts that are completed.
        history: the file of the messages so far; None: of this chat alone.
    """

    interactive = True

    def __init__(self, commands: list[str], history: Path | None):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from rich.console import Console
        from rich.style import Style

        # The console knows what the terminal can do; printing with it would expand tabs.
        self._dim = Style(dim=True) if Console().color_system else Style.null()
        self._thinking, self._at_start = False, True
        kept = InMemoryHistory() if history is None else FileHistory(str(history))
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            completer=WordCompleter(commands, sentence=True),
            complete_while_typing=False,
            multiline=True,
            key_bindings=_bindings(),
            prompt_continuation="  ",
        )

    def messages(self) -> Iterator[str]:
        """The messages, until Ctrl-D or a second Ctrl-C with nothing typed.

        Ctrl-C forgets what is typed.
        """
        asked = False
        while True:
            try:
                text = self._session.prompt("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    asked = False
                    continue
                if asked:
                    return
                asked = True
                self.note("Ctrl-C once more, or Ctrl-D, leaves.")
                continue
            asked = False
            yield text

    def show(self, part: Said) -> None:
        thinking = isinstance(part, Reasoning)
        if self._thinking and not thinking:
            write("\n\n")
        self._thinking = thinking
        text = part.text.lstrip("\n") if self._at_start else part.text
        self._at_start = self._at_start and not text
        text = text.translate(_HARMLESS)
        write(self._dim.render(text) if thinking else text)

    def end(self) -> None:
        write("\n")
        self._thinking, self._at_start = False, True

    def note(self, text: str) -> None:
        write(self._dim.render(text) + "\n")


def _bindings() -> Any:
    """Enter sends, after a backslash it begins a new line, and so does Alt-Enter."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def history_file() -> Path:
    """The file of all messages, as XDG has it, which nobody else may read.

    Raises OSError where it cannot be written.
    """
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "glm-fused"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "chat_history"
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    return file
