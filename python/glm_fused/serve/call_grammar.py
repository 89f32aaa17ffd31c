"""Grammars of answers: calls of tools in GLM's format, with arguments that fit, and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .grammar import quoted
from .schemas import TYPES, resolved, subschemas, value_types
from .tools import CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END, Tool

# Space without limit would let a model write nothing else; one after a comma or colon is usual.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_MOST_REPEATED = 10_000  # what counts in a pattern may come to when multiplied with each other
_DEEPEST, _MOST = 8, 2000  # unions within unions of an argument's values, and values in all
_DEFINITIONS = ("$defs", "definitions")

Mark = Callable[[str], str]


def answer_grammar(
    tools: Sequence[Tool], choice: str | Tool, schema: Any, parallel: bool, mark: Mark
) -> str | None:
    """The grammar, in Lark, of an answer; None where it may be anything.

    Args:
        tools: those that may be called.
        choice: "auto", "none", "required", or the one tool that has to be called.
        schema: the JSON schema of a text; None: any text.
        parallel: whether there may be several calls.
        mark: how Lark names a mark of the format.

    Raises:
        ValueError: a schema cannot be made a grammar; the message names it.
    """
    if isinstance(choice, Tool):
        return f"start: call\n{CallGrammar([choice], mark).rules}"
    if choice == "required":
        return f"start: {'call+' if parallel else 'call'}\n{CallGrammar(tools, mark).rules}"
    if schema is not None:
        text = f"text: {_json(schema, '[response_format] json_schema.schema', strict=True)}\n"
        if not tools:
            return f"start: text\n{text}"
        calls = CallGrammar(tools, mark).rules
        return f"start: text | {'call+' if parallel else 'call'}\n{text}{calls}"
    if tools and (not parallel or any(tool.strict for tool in tools)):
        return _text_and_calls(CallGrammar(tools, mark).rules, parallel, mark(CALL))
    return None


def _text_and_calls(calls: str, parallel: bool, mark: str) -> str:
    """Text, and after it calls, or between several of them more text."""
    if mark.startswith("<["):  # a control token, which no text has in it
        opening, rest = f"TEXT? {mark}", "TEXT: /(?s:.+)/\n"
    else:
        without = f"(/(?s:.*)/ & ~/(?s:.*){_escaped(CALL)}(?s:.*)/)"
        opening, rest = "OPENING", f"TEXT: {without}\nOPENING: {without} {mark}\n"
    several = f"({opening} called)* TEXT?" if parallel else f"TEXT? | {opening} called"
    return f"start: {several}\n{rest}{calls}"


def _escaped(text: str) -> str:
    """A text as a regular expression within Lark's slashes."""
    return re.escape(text).replace("/", "\\/")


def _json(schema: Any, what: str, strict: bool) -> str:
    """The Lark expression of JSON texts that fit a schema; of what it cannot say, unless strict,
    only as much as it can.

    Raises ValueError, beginning with ``what``, for a schema that no grammar should be made of.
    """
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"{what} is no JSON schema, which is an object.")
    for one in subschemas(schema):
        check_pattern(one.get("pattern"), what)
    whole = {} if schema is True else {"not": {}} if schema is False else schema
    options = _COMPACT | ({} if strict else {"lenient": True})
    try:
        return f"%json {json.dumps(whole | {'x-guidance': options}, allow_nan=False)}"
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{what} is no JSON schema: {error}.") from None


def check_pattern(pattern: Any, what: str) -> None:
    """Raise ValueError for a regular expression whose counts multiply to more than is sensible."""
    if not isinstance(pattern, str):
        return
    counts = re.findall(r"\{(\d*),?(\d*)\}", pattern)
    product = math.prod(max(int(n[:9] or 1) for n in pair) or 1 for pair in counts)
    if product > _MOST_REPEATED:
        raise ValueError(
            f"{what}: the pattern {pattern[:80]!r} counts up to {product}, expected at most"
            f" {_MOST_REPEATED}."
        )


class CallGrammar:
    """Lark rules of calls of some tools.

    Args:
        tools: those that may be called.
        mark: how Lark names a mark of the format.
    """

    def __init__(self, tools: Sequence[Tool], mark: Mark):
        self._mark, self._rules, self._values = mark, list[str](), 0
        names = [self._call(i, tool) for i, tool in enumerate(tools)]
        self._rules.append(f"called: {' | '.join(names)}\ncall: {mark(CALL)} called")

    @property
    def rules(self) -> str:
        """The rules: ``call`` is a call of one of the tools, ``called`` one without its mark."""
        return "\n".join(self._rules) + "\n"

    def _call(self, i: int, tool: Tool) -> str:
        what = f"[tools] parameters of {tool.name!r}"
        schema = resolved(tool.parameters, tool.parameters)
        if not isinstance(schema, Mapping):
            raise ValueError(f"{what}: $ref names nothing in it.")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise ValueError(f"{what}: properties is no object, or required no list.")
        parts = []
        for j, key in enumerate(dict.fromkeys([*properties, *map(str, required)])):
            value = self._value(f"{i}_{j}", properties.get(key, True), tool, f"{what}: {key!r}")
            rule = f"{self._mark(KEY)} {quoted(key)} {self._mark(KEY_END)} {value}"
            parts.append(rule if key in required else f"({rule})?")
        if not parts and schema.get("additionalProperties", True) is not False and schema:
            parts = [self._any_arguments(i)]
        body = " ".join(parts)
        self._rules.append(f"call_{i}: {quoted(tool.name)} {body} {self._mark(CALL_END)}")
        return f"call_{i}"

    def _any_arguments(self, i: int) -> str:
        """Arguments of any names, for an object that declares none."""
        value = self._text(f"ANY_{i}", {})
        return f"({self._mark(KEY)} /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ {self._mark(KEY_END)} {value})*"

    def _value(self, name: str, schema: Any, tool: Tool, what: str, depth: int = 0) -> str:
        """A value between its marks: texts as they are, others as JSON."""
        self._values += 1
        if self._values > _MOST:
            raise ValueError(
                f"{what}: there are more than {_MOST} values in parameters and unions."
            )
        found = resolved(schema, tool.parameters)
        found = found if isinstance(found, Mapping) else {}
        unions = (key for key in ("anyOf", "oneOf") if isinstance(found.get(key), list))
        union = next(unions, None)
        if union is None:
            return self._plain_value(name, found, tool, what)
        if depth == _DEEPEST:
            raise ValueError(f"{what}: {union} leads to another more than {_DEEPEST} times.")
        rest = {key: value for key, value in found.items() if key != union}
        options = []
        for i, one in enumerate(found[union]):
            branch = resolved(one, tool.parameters)
            inner = rest | (dict(branch) if isinstance(branch, Mapping) else {})
            options.append(self._value(f"{name}_{i}", inner, tool, what, depth + 1))
        return f"({' | '.join(options)})"

    def _plain_value(self, name: str, schema: Mapping[str, Any], tool: Tool, what: str) -> str:
        types = value_types(schema, tool.parameters)
        others, options = types - {"string"}, []
        if "string" in types:
            options.append(self._text(name, schema, what))
        if others and types != TYPES:  # a text may be anything, JSON as well
            inner = {k: v for k, v in tool.parameters.items() if k in _DEFINITIONS} | dict(schema)
            if "string" in types:
                inner["type"] = sorted(others)
                if isinstance(inner.get("enum"), list):
                    inner["enum"] = [one for one in inner["enum"] if not isinstance(one, str)]
            json_text = _json(inner, what, tool.strict)
            options.append(f"{self._mark(VALUE)} {json_text} {self._mark(VALUE_END)}")
        return f"({' | '.join(options)})"

    def _text(self, name: str, schema: Mapping[str, Any], what: str = "") -> str:
        """A text that ends at its mark, and is one of an enumeration or follows a pattern."""
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(listed, list):
            texts = " | ".join(quoted(one) for one in listed if isinstance(one, str))
            return f"{self._mark(VALUE)} ({texts}) {self._mark(VALUE_END)}"
        check_pattern(schema.get("pattern"), what)
        least, most = schema.get("minLength"), schema.get("maxLength")
        body = "/(?s:.*)/"
        if isinstance(least, int) or isinstance(most, int):
            body = f"/(?s:.{{{least or 0},{'' if most is None else most}}})/"
        if isinstance(schema.get("pattern"), str):
            body += f" & {_searched(schema['pattern'])}"
        end = self._mark(VALUE_END)
        if end.startswith("<["):  # a control token, which no text has in it
            self._rules.append(f"TEXT_{name}: {body}")
            return f"{self._mark(VALUE)} TEXT_{name} {end}"
        without = f"~/(?s:.*){_escaped(VALUE_END)}(?s:.*)/"
        self._rules.append(f"TEXT_{name}: ({body} & {without}) {end}")
        return f"{self._mark(VALUE)} TEXT_{name}"


def _searched(pattern: str) -> str:
    """Lark's expression of texts in which a pattern is found, as JSON schema means it."""
    start = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    inner = (inner.removesuffix("$") if not end else inner).replace("/", "\\/")
    return f"/{start}({inner}){end}/"
