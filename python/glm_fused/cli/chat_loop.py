"""A conversation: its messages, its answers, and the commands that look after it."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.folder import read_json
from ..checkpoint.writing import new_file as replacing
from ..engine import Engine
from ..generation.decoding import Stopped
from ..generation.kept_cache import KeptCache
from ..generation.options import Options
from ..memory import peak_resident_bytes, size
from ..serve.answers import AnswerParser, Delta, Reasoning, Said, Thinking
from ..validation import show
from . import arguments
from .progress import Progress

if TYPE_CHECKING:
    from .chat_screen import Screen

COMMANDS = {
    "/help": "what can be done here",
    "/reset": "begin anew, with the same system message",
    "/system": "TEXT: what the model is told first; without TEXT nothing",
    "/save": "FILE: write the messages, as JSON",
    "/load": "FILE: go on with messages that /save wrote",
    "/stats": "tokens and speeds of the last answer, and memory",
    "/quit": "leave",
}
ROLES = ("system", "user", "assistant")
_TAIL = 16  # tokens at the end of a prompt that may open or end the thinking
THOUGHT = "reasoning_content"  # as OpenAI's clients and GLM's templates call it


@dataclass
class Turn:
    """What an answer took: tokens, and seconds since the question."""

    prompt: int = 0
    cached: int = 0
    prompt_seconds: float = 0.0
    generated: int = 0
    seconds: float = 0.0
    ended: str = "stopped"

    def format(self) -> list[str]:
        """Lines for a terminal."""
        new, decoded = self.prompt - self.cached, self.generated - 1
        later = self.seconds - self.prompt_seconds
        return [
            f"prompt      {self.prompt} tokens: {self.cached} cached, {new} processed in"
            f" {self.prompt_seconds:.2f} s",
            f"generated   {self.generated} tokens"
            + (f", {decoded / later:.1f} tok/s" if decoded > 0 and later > 0 else "")
            + f" ({self.ended})",
        ]


class Chat:
    """A conversation with a model, whose cache goes from one answer to the next.

    Args:
        engine: answers.
        how: how it generates; ``max_tokens`` is how long an answer may be.
        screen: where messages come from and answers go.

    Raises ValueError for a model without a chat template.
    """

    def __init__(self, engine: Engine, how: Options, screen: Screen):
        if not engine.tokenizer.has_chat_template:
            raise ValueError(
                f"[chat] {engine.path} has no chat template, expected one that says how messages"
                " become a prompt; `glm-fused generate` continues texts."
            )
        self._engine, self._how, self._screen = engine, how, screen
        self._kept = KeptCache(engine.model)
        self._turn: Turn | None = None
        self.messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Answer messages and follow commands until there are no more.

        In a terminal an error is shown and the chat goes on; elsewhere it is raised.
        """
        for text in self._screen.messages():
            try:
                if not self._take(text):
                    return
            except (OSError, RuntimeError, ValueError) as error:
                if not self._screen.interactive:
                    raise
                self._screen.note(f"error: {error}")

    def _take(self, text: str) -> bool:
        """Follow a command or answer a message; returns whether there may be another."""
        if not text.strip():
            return True
        if not text.startswith("/") or text.startswith("//"):
            self.answer(text.removeprefix("/") if text.startswith("//") else text)
            return True
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        commands = {
            "/help": self._help,
            "/reset": self.reset,
            "/system": lambda: self.system(rest),
            "/save": lambda: self.save(rest),
            "/load": lambda: self.load(rest),
            "/stats": self._stats,
        }
        if name == "/quit":
            return False
        if name not in commands:
            raise ValueError(f"{show(name)} is no command; /help lists them (// begins a message).")
        if rest and name in ("/help", "/reset", "/stats"):
            raise ValueError(f"{name} takes nothing after it, found {show(rest)}.")
        commands[name]()
        return True

    def answer(self, text: str) -> None:
        """Answer a message.

        An answer that is stopped stays as far as it got; where none was begun, the message is taken
        back. Raises ValueError for a conversation that does not fit the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens = self._engine.encode(asked)
        turn = self._turn = Turn(prompt=len(tokens))
        said, thought = "", ""
        with _stoppable(self._screen.interactive) as stop, contextlib.suppress(Stopped):
            for part in self._parts(tokens, turn, stop):
                if isinstance(part, Reasoning):
                    thought += part.text
                else:
                    said += part.text
                self._screen.show(part)
        self._screen.end()
        if turn.ended == "stopped" and not said.strip():
            self._screen.note("Stopped before an answer; the message is taken back.")
            return
        answer = {"role": "assistant", "content": said} | ({THOUGHT: thought} if thought else {})
        self.messages = [*asked, answer]

    def _parser(self, tokens: list[int]) -> AnswerParser:
        """Takes apart what follows a prompt of these tokens."""
        tokenizer = self._engine.tokenizer
        if (thinking := Thinking.of(tokenizer)) is None:
            return AnswerParser()
        opened, closed = thinking.left_by(tokenizer.decode(tokens[-_TAIL:]))
        return AnswerParser((), thinking, opened=opened, closed=closed)

    def _parts(self, tokens: list[int], turn: Turn, stop: threading.Event) -> Iterator[Said]:
        """The parts of an answer as they come; ``turn`` counts, ``stop`` ends it."""
        parser = self._parser(tokens)
        room = self._engine.context - len(tokens)
        how = replace(self._how, max_tokens=min(self._how.max_tokens or room, room))
        began, begun = time.perf_counter(), False
        with Progress() as progress:

            def on_progress(what: str, done: int, total: int) -> None:
                nonlocal begun
                turn.seconds = time.perf_counter() - began
                if what == "generation":
                    turn.generated = done
                elif not begun:
                    turn.cached, begun = done, True
                if what == "prompt":
                    turn.prompt_seconds = turn.seconds
                    if self._screen.interactive:
                        progress(what, done, total)
                if stop.is_set():
                    raise Stopped

            pieces = self._engine.stream(tokens, how, on_progress=on_progress, caches=self._kept)
            for piece in pieces:
                turn.ended = piece.finish_reason or turn.ended
                yield from _said(parser.feed_text(piece.text))
            yield from _said(parser.finish())

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def system(self, text: str) -> None:
        """Have the model told ``text`` first, or nothing."""
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def save(self, name: str) -> None:
        """Write the messages to a file, in the place of one of that name.

        Raises OSError where it cannot be written.
        """
        if not name:
            raise ValueError("/save: expected a file to write.")
        file = arguments.new_file(name)
        document = json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False)
        with replacing(file) as out:
            out.write(f"{document}\n".encode())
        self._screen.note(f"{file}: {len(self.messages)} messages.")

    def load(self, name: str) -> None:
        """Go on with the messages of a file that `save` wrote.

        Raises OSError and ValueError, naming the file, for one that cannot be read or is another.
        """
        if not name:
            raise ValueError("/load: expected a file that /save wrote.")
        self.messages = read_messages(Path(name).expanduser())
        self._screen.note(f"{name}: {len(self.messages)} messages.")

    def _help(self) -> None:
        lines = [f"{name:<10}{effect}" for name, effect in COMMANDS.items()]
        if self._screen.interactive:
            lines.append("Enter sends; after a \\, and with Alt, it begins a new line.")
            lines.append("Ctrl-C ends an answer, Ctrl-D the chat.")
        self._screen.note("\n".join(lines))

    def _stats(self) -> None:
        lines = [f"messages    {len(self.messages)}"]
        lines += [] if self._turn is None else self._turn.format()
        held = len(self._kept.tokens)
        lines.append(
            f"context     {held} of {self._engine.context} tokens, {size(self._kept.nbytes)} of"
            f" cache; {size(peak_resident_bytes())} resident at most"
        )
        if (streaming := self._engine.streaming) is not None:
            stats = streaming.stats()
            rate = stats["hit_rate"] or 0.0
            lines.append(f"experts     hit rate {rate:.3f}, {size(stats['bytes'])} read")
        self._screen.note("\n".join(lines))


def _said(deltas: list[Delta]) -> Iterator[Said]:
    """All that an answer has where there are no tools."""
    return (delta for delta in deltas if isinstance(delta, Said))


def read_messages(file: Path) -> list[dict[str, str]]:
    """The messages that `Chat.save` wrote; raises ValueError, naming the file, for others."""
    document = read_json(file)
    messages = document.get("messages")
    if not isinstance(messages, list):
        raise ValueError(f"[chat] {file}: messages are {show(messages)}, expected a list.")
    for i, message in enumerate(messages):
        where = f"[chat] {file}: message {i}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} is {show(message)}, expected a role and a content.")
        if unknown := message.keys() - {"role", "content", THOUGHT}:
            raise ValueError(f"{where} has {show(min(unknown))}, which means nothing here.")
        if message["role"] not in ROLES or (message["role"] == "system" and i):
            expected = f"one of {', '.join(ROLES)}, and system only at first"
            raise ValueError(f"{where} has the role {show(message['role'])}, expected {expected}.")
        for key, text in message.items():
            if not isinstance(text, str):
                raise ValueError(f"{where} has the {key} {show(text)}, expected a text.")
    return messages


@contextlib.contextmanager
def _stoppable(interactive: bool) -> Iterator[threading.Event]:
    """In a terminal, Ctrl-C sets the event that the block gets, and interrupts nothing."""
    stop = threading.Event()
    if not interactive:
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
