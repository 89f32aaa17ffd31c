"""What a body of OpenAI's responses API asks the model for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from . import turn
from .conversation import effort_arguments
from .responses_requests import (
    AllowedTools,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputTokensBody,
    Item,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ResponsesBody,
)
from .turn import Message, Turn, unexpected

LOGPROBS = "message.output_text.logprobs"
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


def turn_of(body: InputTokensBody, before: Sequence[Message] = ()) -> Turn:
    """The conversation in the body, after the messages ``before`` it.

    Raises ApiError (400), naming the field, for what does not fit together.
    """
    said = messages_of(body.input, before)
    if not said and not body.instructions:
        raise unexpected("input", [], "a text or items")
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    tools, choice = _tools(body)
    return Turn(
        [*first, *before, *said],
        [turn.function_tool(t.name, t.description, t.parameters, t.strict) for t in tools],
        choice,
        _template_args(body),
        _response_format(body),
        parallel=body.parallel_tool_calls is not False,
    )


def messages_of(items: Iterable[Item], before: Sequence[Message] = ()) -> list[Message]:
    """Items as messages: what the model thought, said and called at a time is one of these.

    Raises ApiError (400) for the output of a call that is neither in ``items`` nor ``before``.
    """
    known = {call["id"] for message in before for call in message.get("tool_calls", ())}
    messages, answer = list[Message](), _Answer()
    for i, item in enumerate(items):
        if answer.ends_before(item):
            messages.extend(answer.messages())
            answer = _Answer()
        if isinstance(item, FunctionCall):
            known.add(item.call_id)
            answer.calls.append(turn.tool_call(item.call_id, item.name, item.arguments))
        elif isinstance(item, ReasoningItem):
            answer.thoughts.extend(part.text for part in item.content or ())
        elif isinstance(item, FunctionCallOutput):
            if item.call_id not in known:
                at = f"input[{i}].call_id"
                raise unexpected(at, item.call_id, "the call_id of an earlier function_call")
            text = turn.joined(part.text for part in item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        else:
            text = turn.joined(part.text for part in item.content)
            if item.role == "assistant":
                answer.texts.append(text)
            else:
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": text})
    return [*messages, *answer.messages()]


def answered(output: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The items that a response has as its output, as messages."""
    return messages_of(_ITEMS.validate_python(list(output)))


def listed_logprobs(body: ResponsesBody) -> int | None:
    """How many of the likeliest tokens are listed with each; None: no log-probabilities."""
    if body.top_logprobs is None and LOGPROBS not in (body.include or ()):
        return None
    return body.top_logprobs or 0


class _Answer:
    """A message of the assistant, whose parts come one by one."""

    def __init__(self) -> None:
        self.thoughts, self.texts, self.calls = list[str](), list[str](), list[dict[str, Any]]()

    def ends_before(self, item: Item) -> bool:
        """Whether the item belongs to another message: a thought or text after calls does."""
        if isinstance(item, FunctionCall):
            return False
        if isinstance(item, ReasoningItem):
            return bool(self.texts or self.calls)
        return not (isinstance(item, MessageItem) and item.role == "assistant") or bool(self.calls)

    def messages(self) -> list[Message]:
        """The message, if there is any of it."""
        if not (self.thoughts or self.texts or self.calls):
            return []
        thoughts, text = turn.joined(self.thoughts), turn.joined(self.texts)
        return [turn.assistant(text, thoughts, self.calls)]


def _tools(body: InputTokensBody) -> tuple[list[FunctionTool], turn.ToolChoice]:
    """The tools that may be called, and whether one has to be."""
    tools, choice = list(body.tools or ()), body.tool_choice
    names = {tool.name for tool in tools}
    wanted: list[NamedFunction] = []
    if isinstance(choice, NamedFunction):
        wanted = [choice]
    elif isinstance(choice, AllowedTools):
        wanted = choice.tools
    for one in wanted:
        if one.name not in names:
            expected = f"one of tools: {', '.join(sorted(names)) or 'there is none'}"
            raise unexpected("tool_choice", one.name, expected)
    if isinstance(choice, AllowedTools):
        allowed = {one.name for one in choice.tools}
        return [tool for tool in tools if tool.name in allowed], choice.mode
    if isinstance(choice, NamedFunction):
        return tools, turn.named(choice.name)
    if choice == "required" and not tools:
        raise unexpected("tool_choice", choice, "tools to choose from")
    return tools, choice or "auto"


def _template_args(body: InputTokensBody) -> dict[str, Any]:
    effort = None if body.reasoning is None else body.reasoning.effort
    return effort_arguments(effort) | (body.chat_template_kwargs or {})


def _response_format(body: InputTokensBody) -> dict[str, Any] | None:
    format = None if body.text is None else body.text.format
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return {"type": "json_object"}
    if format.schema_ is None:
        raise unexpected("text.format.schema", None, "a JSON schema")
    return turn.json_schema(format.name or "answer", format.schema_, format.strict is not False)
