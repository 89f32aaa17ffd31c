"""A call's arguments as a JSON object, written while they are generated."""

from __future__ import annotations

import json

from .tools import Tool, argument_json


class ArgumentWriter:
    """Writes the JSON object of one call's arguments; what it returns, put together, is the object.

    Texts are passed on as they come. Other values are, once they are whole, what the tool's schema
    says that they are.
    """

    def __init__(self, tool: Tool):
        self._tool, self._keys = tool, set[str]()
        self._types: frozenset[str] | None = None  # of the value that is open
        self._value = ""

    def begin_value(self, key: str) -> str:
        """Begin the argument ``key``; one that has been there is not written again."""
        self._value, self._types = "", None
        if key in self._keys:
            return ""
        self._types = self._tool.types(key)
        start = ", " if self._keys else "{"
        self._keys.add(key)
        return start + json.dumps(key, ensure_ascii=False) + (': "' if self._plain else ": ")

    def more(self, text: str) -> str:
        """Go on with the value."""
        if self._plain:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._value += text
        return ""

    def end_value(self) -> str:
        """End the value."""
        plain, types, self._types = self._plain, self._types, None
        if types is None:
            return ""
        return '"' if plain else argument_json(self._value, types)

    def end(self) -> str:
        """End the object, and a value that is open."""
        return self.end_value() + ("}" if self._keys else "{}")

    @property
    def _plain(self) -> bool:
        return self._types == frozenset({"string"})
