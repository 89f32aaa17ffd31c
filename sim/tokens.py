"""A token view of preprocessed shader text that can be edited without moving its lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<marker>^\#[^\n]*$)
      | (?P<space>\s+)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<char>'(?:\\.|[^'\\\n])*')
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<sign>::|->|\[\[|<<=|>>=|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\+\+|--|<<|.)""",
    re.M | re.S | re.X,
)
_OVER_LINES = ("space", "string", "char")  # the kinds that may hold a newline
_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)\s+"((?:[^"\\]|\\.)*)"')
_CLOSERS = {"(": ")", "[": "]", "{": "}", "[[": "]"}


class SyntaxProblem(ValueError):
    """The text has brackets that do not match, or a construct that is not understood."""


@dataclass(slots=True)
class Token:
    """One token; `own` is false for text that came from the simulator's own headers."""

    kind: str
    text: str
    file: str
    line: int
    own: bool = True


def _scan(text: str, foreign: str) -> Iterator[Token]:
    file, line, own = "", 1, True
    for match in _TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match.group()
        yield Token(kind, piece, file, line, own)
        if kind == "marker" and (marker := _MARKER.match(piece)):
            # The newline that ends the marker counts one line.
            file, line = marker[2], int(marker[1]) - 1
            own = not (foreign and file.startswith(foreign))
        if kind in _OVER_LINES:
            line += piece.count("\n")


class TokenStream:
    """The significant tokens by position (`stream[i]` is a text), with matched brackets.

    `foreign` is the path prefix of headers whose text is not the author's."""

    def __init__(self, text: str, foreign: str = "") -> None:
        self.all = list(_scan(text, foreign))
        self.places = [i for i, t in enumerate(self.all) if t.kind not in ("space", "marker")]
        self.texts = [self.all[i].text for i in self.places]
        self.partner = self._match_brackets()
        self._edits: list[tuple[int, int, str]] = []

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> str:
        return self.texts[i] if 0 <= i < len(self.texts) else ""

    def token(self, i: int) -> Token:
        return self.all[self.places[i]]

    def _match_brackets(self) -> dict[int, int]:
        """The partner of every bracket, by position.

        `[[` may also open two subscripts (`a[[b]…`), so its halves close one by one."""
        partner: dict[int, int] = {}
        stack: list[tuple[str, int]] = []
        for i, text in enumerate(self.texts):
            if text in _CLOSERS:
                stack += [(text, i)] if text != "[[" else [("[", i), ("[", i)]
            elif text in (")", "]", "}"):
                if not stack or _CLOSERS[stack[-1][0]] != text:
                    token = self.token(i)
                    raise SyntaxProblem(f"{token.file}:{token.line}: unmatched {text!r}")
                opener = stack.pop()[1]
                partner[opener] = i  # the second closer of a `[[` comes last and stays
                partner[i] = opener
        if stack:
            token = self.token(stack[-1][1])
            raise SyntaxProblem(f"{token.file}:{token.line}: {token.text!r} is never closed")
        return partner

    def close(self, i: int) -> int:
        """The position that closes the bracket at i, or opens the one closed there."""
        return self.partner[i]

    def angle(self, i: int) -> int:
        """The `>` that closes the `<` at i."""
        depth, start = 0, i
        while i < len(self):
            text = self[i]
            if text in _CLOSERS:
                i = self.close(i)
            elif text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif text == ";":
                break
            i += 1
        token = self.token(start)
        raise SyntaxProblem(f"{token.file}:{token.line}: template argument list is never closed")

    def split(self, start: int, stop: int, separator: str = ",") -> list[tuple[int, int]]:
        """The ranges between separators outside every bracket."""
        pieces, first, i, depth = [], start, start, 0
        while i < stop:
            text = self[i]
            if text in _CLOSERS:
                i = self.close(i)
            elif text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
            elif text == separator and depth <= 0:
                pieces.append((first, i))
                first = i + 1
            i += 1
        return [*pieces, (first, stop)] if first < stop else pieces

    def operand_end(self, i: int) -> int:
        """Where the operand of a `?:` that starts at i ends: its `:`, or what closes the whole."""
        nested = 0
        while i < len(self):
            text = self[i]
            if text in _CLOSERS:
                i = self.close(i)
            elif text == "<" and self._template_arguments(i):
                i = self.angle(i)
            elif (
                text in (",", ";", ")", "]", "}")
                or (text == ":" and nested == 0)
                or (text == ">" and self._closes_arguments(i))
            ):
                break
            else:
                nested += (text == "?") - (text == ":")
            i += 1
        return i

    def _closes_arguments(self, i: int) -> bool:
        """Whether the `>` at i closes template arguments: after a shift there is an operand."""
        while self[i] == ">":
            i += 1
        return self[i] in (",", ";", ")", "::", "{")

    def _template_arguments(self, i: int) -> bool:
        """Whether the `<` at i opens a template argument list rather than compares."""
        if not self[i - 1].isidentifier():
            return False
        try:
            return self[self.angle(i) + 1] in ("(", "{", "::")
        except SyntaxProblem:
            return False

    def text(self, start: int, stop: int) -> str:
        return " ".join(self.texts[start:stop])

    def replace(self, start: int, stop: int, text: str) -> None:
        """Put `text` in place of tokens start … stop-1; later lines stay where they are."""
        self._edits.append((self.places[start], self.places[stop - 1] + 1, text))

    def insert(self, i: int, text: str) -> None:
        """Put `text` before token i."""
        self._edits.append((self.places[i], self.places[i], text))

    def edited(self) -> str:
        out, at = [], 0
        for start, stop, text in sorted(self._edits, key=lambda edit: edit[:2]):
            if start < at:
                raise SyntaxProblem(f"overlapping edits near {self.all[start].text!r}")
            gone = self.all[start:stop]
            out += [t.text for t in self.all[at:start]]
            out.append(text)
            out += [
                f"\n{t.text}\n" if t.kind == "marker" else "\n" * t.text.count("\n") for t in gone
            ]
            at = stop
        return "".join([*out, *(t.text for t in self.all[at:])])
