"""What a body of Anthropic's messages API asks the model for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from . import turn
from .anthropic_requests import (
    AssistantMessage,
    CountTokensBody,
    Document,
    MessagesBody,
    SystemMessage,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    UserMessage,
)
from .conversation import effort_arguments
from .errors import ApiError
from .turn import Message, Turn, unexpected

# Claude Code's system text begins with a line for the service's bills, another in each session:
# with it no prompt would begin as one of an earlier session did.
_BILLING = "x-anthropic-billing-header:"


def turn_of(body: CountTokensBody) -> Turn:
    """The conversation in the body.

    Raises ApiError (400), naming the field, for what does not fit together.
    """
    messages: list[Message] = []
    if system := _text([each for each in body.system if not each.text.startswith(_BILLING)]):
        messages.append({"role": "system", "content": system})
    known = set[str]()
    for i, message in enumerate(body.messages):
        messages.extend(_messages(message, f"messages[{i}]", known))
    if isinstance(body.messages[-1], AssistantMessage):
        at = f"messages[{len(body.messages) - 1}].role"
        raise unexpected(at, "assistant", "a message to answer: there is no prefilling")
    format = body.output_format
    if body.output_config is not None and body.output_config.format is not None:
        format = body.output_config.format
    choice = body.tool_choice
    return Turn(
        messages,
        _tools(body),
        _tool_choice(body),
        _template_args(body),
        None if format is None else turn.json_schema("answer", format.schema_),
        parallel=not (choice and choice.disable_parallel_tool_use),
    )


def check_messages(body: MessagesBody) -> None:
    """Raise ApiError (400) for a conversation that the server is to keep.

    Anthropic's client knows the error's code, and then sends all of the conversation each time.
    """
    if body.thread not in (None, False):
        text = "thread: there are none on this server, expected all messages each time."
        raise ApiError(400, text, param="thread", code="thread_unsupported_request")


def options_of(body: MessagesBody) -> dict[str, Any]:
    """How to generate, by the names of `Options`, without the number of tokens."""
    return {
        "temp": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": None if body.stop_sequences is None else tuple(body.stop_sequences),
    }


def shows_thinking(body: CountTokensBody) -> bool:
    """Whether the client wants to read what the model thinks."""
    return body.thinking is None or body.thinking.display != "omitted"


def _messages(
    message: UserMessage | AssistantMessage | SystemMessage, at: str, known: set[str]
) -> Iterator[Message]:
    """A message as chat templates have it; ``known`` are the calls of tools so far."""
    if isinstance(message, SystemMessage):
        yield {"role": "system", "content": _text(message.content)}
    elif isinstance(message, AssistantMessage):
        calls = [block for block in message.content if isinstance(block, ToolUse)]
        known.update(call.id for call in calls)
        thoughts = [block.thinking for block in message.content if isinstance(block, Thinking)]
        yield turn.assistant(
            _text([block for block in message.content if isinstance(block, Text)]),
            turn.joined(thoughts),
            [turn.tool_call(c.id, c.name, json.dumps(c.input, ensure_ascii=False)) for c in calls],
        )
    else:
        yield from _of_user(message, at, known)


def _of_user(message: UserMessage, at: str, known: set[str]) -> Iterator[Message]:
    """Results of tools, each a message of its own, and what the user says before and after."""
    said: list[Text | Document] = []
    for i, block in enumerate(message.content):
        if not isinstance(block, ToolResult):
            said.append(block)
            continue
        if block.tool_use_id not in known:
            field = f"{at}.content[{i}].tool_use_id"
            raise unexpected(field, block.tool_use_id, "the id of an earlier tool_use block")
        if said:
            yield {"role": "user", "content": _text(said)}
            said = []
        text = _text(block.content) or ("The tool failed." if block.is_error else "")
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
    if said or not message.content:
        yield {"role": "user", "content": _text(said)}


def _tools(body: CountTokensBody) -> list[dict[str, Any]]:
    return [
        turn.function_tool(tool.name, tool.description, tool.input_schema, tool.strict)
        for tool in body.tools or ()
    ]


def _tool_choice(body: CountTokensBody) -> turn.ToolChoice:
    choice, names = body.tool_choice, [tool.name for tool in body.tools or ()]
    if choice is None:
        return "auto"
    if choice.type == "tool":
        if choice.name not in names:
            expected = f"one of tools: {', '.join(names) or 'there is none'}"
            raise unexpected("tool_choice.name", choice.name, expected)
        return turn.named(choice.name)
    if choice.type == "any" and not names:
        raise unexpected("tool_choice", choice.type, "tools to choose from")
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _template_args(body: CountTokensBody) -> dict[str, Any]:
    """Anthropic's models think only where a request says so."""
    if body.thinking is None or body.thinking.type == "disabled":
        return {"enable_thinking": False}
    effort = None if body.output_config is None else body.output_config.effort
    return {"enable_thinking": True} | effort_arguments(effort)


def _text(blocks: Sequence[Text | Document]) -> str:
    return turn.joined(block.text for block in blocks)
