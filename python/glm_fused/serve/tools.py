"""Tools that a model may call: their definitions, and calls as the text that GLM writes.

    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>

Texts stand between the marks as they are, other values as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tool_parsers import glm47

from ..validation import show
from .schemas import read_json, type_of, value_types

CALL, CALL_END = glm47.tool_call_start, glm47.tool_call_end
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
FORMAT = "glm47"  # what mlx-lm calls it
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

# What GLM's own templates tell the model, for templates that know no tools.
_DESCRIPTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, output the function name and arguments within the following XML format:
{call}{{function-name}}{key}{{arg-key-1}}{key_end}{value}{{arg-value-1}}{value_end}…{call_end}
"""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    ``parameters`` is the JSON schema of its arguments, an object's; with ``strict`` every keyword
    in it holds for arguments that a grammar constrains.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def types(self, argument: str) -> frozenset[str]:
        """The JSON types that an argument may have."""
        properties = self.parameters.get("properties")
        found = properties.get(argument) if isinstance(properties, Mapping) else None
        return value_types(found, self.parameters)

    def definition(self) -> dict[str, Any]:
        """The definition as OpenAI's API has it, which chat templates expect."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": dict(self.parameters)}}


def read_tools(definitions: Sequence[Any] | None) -> tuple[Tool, ...]:
    """The tools of OpenAI's ``{"type": "function", "function": {"name", …}}`` definitions.

    Raises ValueError, naming the tool, for what is no such definition, and for a name given twice.
    """
    if not isinstance(definitions, (list, tuple, type(None))):
        raise ValueError(f"[tools] tools is {show(definitions)}, expected a list.")
    tools = tuple(_tool(i, one) for i, one in enumerate(definitions or ()))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"[tools] tools[{i}]: there is another tool {name!r} before it.")
    return tools


def _tool(i: int, found: Any) -> Tool:
    function = found.get("function") if isinstance(found, Mapping) else None
    if not isinstance(function, Mapping) or found.get("type", "function") != "function":
        raise ValueError(
            f'[tools] tools[{i}] is {show(found)}, expected {{"type": "function", "function": …}}.'
        )
    name, description = function.get("name"), function.get("description") or ""
    parameters, strict = function.get("parameters") or {}, function.get("strict") or False
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"[tools] tools[{i}].function.name is {show(name)}, expected 1 to 128 letters, digits"
            " and characters of '_.:/-'."
        )
    for key, value, kind in (
        ("description", description, str),
        ("parameters", parameters, dict),
        ("strict", strict, bool),
    ):
        if not isinstance(value, kind):
            expected = {str: "a text", dict: "a JSON schema", bool: "true or false"}[kind]
            raise ValueError(
                f"[tools] tools[{i}].function.{key} of {name!r} is {show(value)}, expected"
                f" {expected}."
            )
    return Tool(name, description, parameters, strict)


def argument_json(text: str, types: frozenset[str]) -> str:
    """The text of an argument's value as JSON, by the ``types`` that its schema allows.

    A text stays one where the schema allows texts, unless it is JSON of another type that the
    schema names; and where it is no JSON at all.
    """
    try:
        value = read_json(text) if types != {"string"} else text
    except ValueError:
        value = text
    if "string" in types and not type_of(value) & (types - {"string"}):
        value = text
    return json.dumps(value, ensure_ascii=False) if value is text else text.strip()


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as GLM's templates write it."""
    pairs = (
        f"{KEY}{key}{KEY_END}{VALUE}{value_text(value)}{VALUE_END}"
        for key, value in arguments.items()
    )
    return f"{CALL}{name}{''.join(pairs)}{CALL_END}"


def value_text(value: Any) -> str:
    """An argument's value as GLM's templates write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe(tools: Sequence[Tool]) -> str:
    """What tells a model which tools there are, and how to call them."""
    lines = (json.dumps(tool.definition(), ensure_ascii=False) for tool in tools)
    marks = {"call": CALL, "call_end": CALL_END, "key": KEY, "key_end": KEY_END}
    return _DESCRIPTION.format(tools="\n".join(lines), value=VALUE, value_end=VALUE_END, **marks)
