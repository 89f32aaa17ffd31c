"""What a conversation asks the model for, whichever API it came by: OpenAI's chat in its forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..validation import show
from .errors import ApiError

Message = dict[str, Any]
ToolChoice = str | dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A conversation of which the model is to write the next message.

    Attributes:
        messages: ``{"role", "content"}`` with "system", "user", "assistant" or "tool", texts, and
            perhaps ``reasoning_content``, ``tool_calls`` or ``tool_call_id``.
        tools: functions that the model may call.
        tool_choice: "auto", "none", "required", or the function that has to be called.
        template_args: further arguments of the chat template, such as ``enable_thinking``.
        response_format: the form of the answer, such as a JSON schema; None: any.
        parallel: whether an answer may have several calls.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    response_format: Mapping[str, Any] | None = None
    parallel: bool = True


def function_tool(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None
) -> dict[str, Any]:
    """A function that the model may call."""
    function: dict[str, Any] = {"name": name, "parameters": dict(parameters or {"type": "object"})}
    if description is not None:
        function["description"] = description
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    """The choice of one function."""
    return {"type": "function", "function": {"name": name}}


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call in a message of the assistant; ``arguments`` are JSON."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def json_schema(name: str, schema: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The form of an answer that a JSON schema describes."""
    described = {"name": name, "schema": dict(schema), "strict": strict}
    return {"type": "json_schema", "json_schema": described}


def joined(texts: Iterable[str]) -> str:
    """The text of a message that came as several, which are lines of their own."""
    return "\n".join(texts)


def assistant(text: str, reasoning: str, calls: Sequence[Mapping[str, Any]]) -> Message:
    """A message of the assistant, of what is there of its parts."""
    message: Message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def unexpected(param: str, found: object, expected: str) -> ApiError:
    """The error of a field that does not fit the others."""
    return ApiError(400, f"{param}: found {show(found)}, expected {expected}.", param=param)
