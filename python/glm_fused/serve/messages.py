"""The messages of a chat as clients send them, checked, in the one shape that templates get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..validation import show
from .schemas import read_json
from .tools import Tool, call_text, describe

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Check messages, and make each content one text and each call's arguments an object.

    A message has a ``role``, a ``content`` that is a text or a list of ``{"type": "text"}`` parts,
    and an assistant's may have ``reasoning_content`` and ``tool_calls``, as in OpenAI's API, with
    arguments as an object or its JSON. A developer's messages are the system's.

    Raises ValueError, naming the message, for anything else.
    """
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"[messages] messages is {show(messages)}, expected a list of messages.")
    if not messages:
        raise ValueError("[messages] there are no messages, expected at least one.")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"[messages] {where} is {show(message)}, expected an object.")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"[messages] {where}.role is {show(role)}, expected {', '.join(ROLES[:-1])} or"
            f" {ROLES[-1]}."
        )
    read: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # templates would write "None"
    read["content"] = _text(f"{where}.content", content)
    if role == "tool" and message.get("tool_call_id") is not None:
        read["tool_call_id"] = _text(f"{where}.tool_call_id", message["tool_call_id"])
    if role == "assistant":
        if message.get("reasoning_content") is not None:
            key = "reasoning_content"
            read[key] = _text(f"{where}.{key}", message[key])
        if message.get("tool_calls"):
            read["tool_calls"] = _calls(f"{where}.tool_calls", message["tool_calls"])
    return read


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"[messages] {where} is {show(content)}, expected a text.")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = f"of type {show(kind)}" if kind not in (None, "text") else show(part)
            raise ValueError(
                f'[messages] {where}[{i}] is {found}, expected {{"type": "text", "text": …}}: the'
                " model takes text alone."
            )
        texts.append(part["text"])
    return "".join(texts)


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"[messages] {where} is {show(calls)}, expected a list.")
    return [_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'[messages] {where} is {show(call)}, expected {{"type": "function", "function":'
            ' {"name": …, "arguments": …}}.'
        )
    given = arguments = function.get("arguments") or {}
    if isinstance(given, str):
        try:
            arguments = read_json(given)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"[messages] {where}.function.arguments is {show(given)}, expected a JSON object."
        )
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return ({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | read


def without_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Any]:
    """The messages for a template that knows no tools: these, calls and results as text.

    The words are those of GLM's own templates.
    """
    plain = [{"role": "system", "content": describe(tools)}] if tools else []
    for message in messages:
        role, content = message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            content += call_text(call["function"]["name"], call["function"]["arguments"])
        if role == "tool":
            role, content = "user", f"<tool_response>{content}</tool_response>"
        plain.append({"role": role, "content": content})
    return plain
