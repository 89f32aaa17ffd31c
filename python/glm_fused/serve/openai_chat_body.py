"""The body of chat/completions, and the conversation in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from openai.types.chat import (
    ChatCompletionMessageParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolUnionParam,
)
from openai.types.chat.completion_create_params import ResponseFormat
from pydantic import Field

from ..validation import show
from .client_types import Published, without_nulls
from .openai_fields import MOST_TOP_LOGPROBS, Sampled, misfit, only

_Object = dict[str, Any]
_Objects = list[_Object]
_MESSAGES = Published(Iterable[ChatCompletionMessageParam])
_TOOL_LIST = Published(Iterable[ChatCompletionToolUnionParam] | None)
_CHOICE = Published(ChatCompletionToolChoiceOptionParam | None)
_FORMAT = Published(ResponseFormat | None)
_TEXT_ONLY = only(["text"], because="this model writes text")
_TOOLS = only(because="it became tools and tool_choice")
_MODERATION = only(because="this server moderates nothing")
_SEARCH = only(because="this server searches nothing")
_VERBOSITY = only("medium", because="the model knows no other")
_Whatever = Annotated[Any, Field(default=None)]  # of OpenAI's own service; it changes no answer


class ChatBody(Sampled):
    """A body of chat/completions."""

    messages: Annotated[_Objects, _MESSAGES, Field(min_length=1)]
    tools: Annotated[_Objects | None, _TOOL_LIST] = None
    tool_choice: Annotated[str | _Object | None, _CHOICE] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[_Object | None, _FORMAT] = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    modalities: Annotated[list[str] | None, _TEXT_ONLY] = None
    audio: Annotated[Any, _TEXT_ONLY] = None
    function_call: Annotated[Any, _TOOLS] = None
    functions: Annotated[Any, _TOOLS] = None
    moderation: Annotated[Any, _MODERATION] = None
    web_search_options: Annotated[Any, _SEARCH] = None
    verbosity: Annotated[str | None, _VERBOSITY] = None
    metadata: _Whatever
    prediction: _Whatever
    prompt_cache_key: _Whatever
    prompt_cache_options: _Whatever
    prompt_cache_retention: _Whatever
    safety_identifier: _Whatever
    service_tier: _Whatever
    store: _Whatever

    @property
    def wanted_tokens(self) -> tuple[int | None, str]:
        """How many tokens an answer may have, and the field that says so."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def listed_logprobs(self) -> int | None:
        """How many of the likeliest tokens are listed with each; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> dict[str, Any]:
        """What `Conversation.prepare` takes."""
        return {
            "messages": [_message(message) for message in self.messages],
            "tools": without_nulls(self.tools or []),
            "tool_choice": without_nulls(self.tool_choice) or "auto",
            "template_args": self._template_args(),
            "response_format": without_nulls(self.response_format),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
        }

    def _template_args(self) -> dict[str, Any]:
        args: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            args["enable_thinking"] = self.reasoning_effort != "none"
            args["reasoning_effort"] = self.reasoning_effort
        return args | (self.chat_template_kwargs or {})


def check_chat(body: ChatBody) -> None:
    """Raise ApiError (400) for fields that do not fit together."""
    if body.top_logprobs is not None and not body.logprobs:
        raise misfit("top_logprobs", "it needs logprobs: true")
    if body.stream_options is not None and not body.stream:
        raise misfit("stream_options", "it needs stream: true")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise misfit("max_tokens", "max_completion_tokens is given too; expected one of them")
    for i, tool in enumerate(body.tools or ()):
        if tool["type"] != "function":
            raise misfit(f"tools[{i}].type", f"found {show(tool['type'])}, expected 'function'")
    _check_choice(body)


def _check_choice(body: ChatBody) -> None:
    choice = body.tool_choice
    names = [tool["function"]["name"] for tool in body.tools or ()]
    if choice in (None, "none", "auto"):
        return
    if not names:
        raise misfit("tool_choice", f"found {show(choice)}, which needs tools")
    if isinstance(choice, dict):
        if choice["type"] != "function":
            kind = show(choice["type"])
            raise misfit("tool_choice.type", f"found {kind}, expected 'function'")
        name = choice["function"]["name"]
        if name not in names:
            found = f"found {show(name)}, expected one of the tools: {', '.join(names)}"
            raise misfit("tool_choice.function.name", found)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates know it; what an assistant refused to say is what it said."""
    message = without_nulls(message)
    if message["role"] == "developer":
        message["role"] = "system"
    if message["role"] == "assistant" and "content" not in message:
        message["content"] = message.pop("refusal", "")
    return message
