"""The outline of shader text: scopes, functions and statements, without a real parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .tokens import TokenStream

_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")', re.S)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n\\]|\\\n|\\.)*", re.M)
_NOT_FUNCTIONS = {
    *("decltype", "alignas", "alignof", "sizeof", "static_assert", "__attribute__", "if", "for"),
    *("while", "switch", "return", "enable_if", "_Pragma"),
}


def strip(text: str) -> str:
    """The text without comments and preprocessor directives; lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        kept = match[1] if match.lastindex else None
        return kept if kept is not None else " " + "\n" * match[0].count("\n")

    return _DIRECTIVE.sub(blank_directive, _COMMENT.sub(blank, text))


def blank_directive(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


@dataclass
class Function:
    """A function's token ranges: `parameters` are within the parentheses, `body` in the braces."""

    name: str
    kernel: bool
    parameters: list[tuple[int, int]]
    body: tuple[int, int]

    @property
    def signature(self) -> tuple[str, int]:
        return self.name, len(self.parameters)


@dataclass
class Outline:
    """The outline of a text; statements are token ranges, with the kind of scope they stand in."""

    stream: TokenStream
    functions: list[Function] = field(default_factory=list)
    declared: list[list[tuple[int, int]]] = field(default_factory=list)
    statements: list[tuple[str, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, file: str) -> Outline:
        outline = cls(TokenStream(f'# 1 "{file}"\n{strip(text)}'))
        outline._scan("namespace", 0, len(outline.stream))
        return outline

    def _scan(self, scope: str, start: int, stop: int) -> None:
        """Collect the statements from start to stop; braces open inner scopes."""
        s = self.stream
        i = first = start
        while i < stop:
            text = s[i]
            if text == "{":
                i = self._open(scope, first, i)
                if s[i] not in (";", ",") or scope in ("function", "kernel"):
                    first = i
                continue
            if text in ("(", "[", "[["):
                i = self._skip_brackets(scope, first, i)
                if scope == "namespace" and self._macro(first, i):
                    first = i
                continue
            if text == ";" or (text == ":" and s[i - 1] in ("public", "private")):
                self._statement(scope, first, i)
                first = i + 1
            i += 1

    def _skip_brackets(self, scope: str, first: int, i: int) -> int:
        s = self.stream
        if scope in ("function", "kernel") and s[i] == "(" and s[i - 1] == "for":
            for piece in s.split(i + 1, s.close(i), ";"):
                self._statement(scope, *piece)
        return s.close(i) + 1

    def _macro(self, first: int, end: int) -> bool:
        """Whether a range is the use of a macro that no `;` ends."""
        s = self.stream
        return s[first + 1] == "(" and s.close(first + 1) + 1 == end and s[end].isidentifier()

    def _statement(self, scope: str, first: int, end: int) -> None:
        if first >= end:
            return
        if scope in ("namespace", "class"):
            opening = self.parameter_list(first, end)
            if opening is not None:
                s = self.stream
                self.declared.append(list(s.split(opening + 1, s.close(opening))))
                return
        self.statements.append((scope, first, end))

    def _open(self, scope: str, first: int, i: int) -> int:
        """Collect the scope whose `{` is at i; returns the position after it."""
        s = self.stream
        closing = s.close(i)
        inside = (i + 1, closing)
        words = set(s.texts[first:i])
        if scope in ("function", "kernel"):
            # A control statement stands before the brace of a block, a declaration before that of
            # an initialiser.
            if s[i - 1] not in (")", "else", "do", "{", "}", ";", ":"):
                return (
                    closing + 1
                    if s[closing + 1] != ";"
                    else self._initialised(scope, first, closing)
                )
            self._scan(scope, *inside)
        elif "namespace" in words or s[first] == "extern":
            self._scan("namespace", *inside)
        elif (opening := self.parameter_list(first, i)) is not None:
            parameters = list(s.split(opening + 1, s.close(opening)))
            kernel = "kernel" in words
            self.functions.append(Function(s[opening - 1], kernel, parameters, inside))
            self.declared.append(parameters)
            self._scan("kernel" if kernel else "function", *inside)
        elif words & {"struct", "class", "union"}:
            self._scan("class", *inside)
        elif s[closing + 1] == ";" and "enum" not in words:
            return self._initialised(scope, first, closing)
        return closing + 1

    def _initialised(self, scope: str, first: int, closing: int) -> int:
        self._statement(scope, first, closing + 1)
        return closing + 2

    def parameter_list(self, first: int, end: int) -> int | None:
        """Where the parameters' parentheses open, if the declaration is a function's, else None."""
        s = self.stream
        i = first
        while i < end and s[i] != "=":
            named = s[i - 1].isidentifier() or "operator" in s.texts[max(first, i - 4) : i]
            if s[i] == "(" and named and s[i - 1] not in _NOT_FUNCTIONS:
                return i
            if s[i] in ("(", "[", "[[", "{"):
                i = s.close(i)
            elif s[i] == "<" and s[i - 1] == "template":
                i = s.angle(i)
            i += 1
        return None

    def calls(self, function: Function) -> Iterator[tuple[str, int, int]]:
        """The name, number of arguments and position of each unqualified call in a body."""
        s = self.stream
        for i in range(*function.body):
            plain = s[i - 1] not in (".", "->", "::") and s[i].isidentifier()
            declares = s[i - 1].isidentifier() and s[i - 1] not in ("return", "else", "case")
            if plain and s[i + 1] == "(" and not declares:
                yield s[i], len(s.split(i + 2, s.close(i + 1))), i
