"""Bodies of OpenAI's responses API, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

from .openai_fields import MOST_TOP_LOGPROBS, only, option
from .schemas import read_json

_Absent = Annotated[Any, only([], False, because="only OpenAI's own service has it")]
_Whatever = Annotated[Any, Field(default=None)]  # of OpenAI's own service; it changes no answer


class _Part(BaseModel):
    """Something within a body; what changes no answer, such as ids and states, is skipped."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class InputText(_Part):
    """A text for the model; others' answers come as output_text."""

    type: Literal["input_text", "output_text"]
    text: str


class Refusal(_Part):
    """An answer that says no."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it says."""
        return self.refusal


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else getattr(part, "type", None)


def _as_parts(content: object) -> object:
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("expected a text or a list of parts")
    return content


_TaggedTexts = (
    Annotated[InputText, Tag("input_text")]
    | Annotated[InputText, Tag("output_text")]
    | Annotated[Refusal, Tag("refusal")]
)
_PARTS = Discriminator(
    _kind,
    custom_error_type="part",
    custom_error_message="a part of type input_text, output_text or refusal",
)
_Texts = Annotated[list[Annotated[_TaggedTexts, _PARTS]], BeforeValidator(_as_parts)]


class MessageItem(_Part):
    """A message; developers are the system."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Texts


def _json_object(text: str) -> str:
    try:
        found = read_json(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return text


class FunctionCall(_Part):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, AfterValidator(_json_object)]


class FunctionCallOutput(_Part):
    """What a call of a function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Texts


class _ReasoningText(_Part):
    text: str


class ReasoningItem(_Part):
    """What the model thought before it answered; it cannot read what others encrypted."""

    type: Literal["reasoning"]
    content: list[_ReasoningText] | None = None


def _item(item: object) -> object:
    """The type of an item; it may be left out of a message."""
    kind = _kind(item)
    return "message" if kind is None and isinstance(item, dict) and "role" in item else kind


_KINDS = Discriminator(
    _item,
    custom_error_type="item",
    custom_error_message=(
        "an item of type message, function_call, function_call_output or reasoning"
    ),
)
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    _KINDS,
]


def _as_items(found: object) -> object:
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if not isinstance(found, list):
        raise ValueError("expected a text or a list of items")
    return found


class FunctionTool(_Part):
    """A function of the client's own."""

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(_Part):
    """The function that has to be called, or one of those that may be."""

    type: Literal["function"]
    name: str


class AllowedTools(_Part):
    """The functions that may, or one of which has to be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1)


def _choice(value: object) -> object:
    return "word" if isinstance(value, str) else _kind(value)


_CHOICES = Discriminator(
    _choice,
    custom_error_type="choice",
    custom_error_message="auto, none, required, or one of type function or allowed_tools",
)
Choice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("word")]
    | Annotated[NamedFunction, Tag("function")]
    | Annotated[AllowedTools, Tag("allowed_tools")],
    _CHOICES,
]


class Format(_Part):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(_Part):
    """How the text of an answer is to be."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(_Part):
    """How much the model is to think; what it thinks comes whole, never as a summary."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class InputTokensBody(BaseModel):
    """The body of input_tokens: all that becomes part of a prompt."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    input: Annotated[list[Item], BeforeValidator(_as_items)] = Field(default_factory=list)
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    conversation: _Absent = None
    personality: _Whatever


class ResponsesBody(InputTokensBody):
    """The body of a request for a response."""

    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: Annotated[float | None, option("temp")] = None
    top_p: Annotated[float | None, option("top_p")] = None
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    background: _Absent = None
    background_options: _Absent = None
    moderation: _Absent = None
    prompt: _Absent = None
    access_programs: _Whatever
    context_management: _Whatever
    image: _Whatever
    max_tool_calls: _Whatever
    prompt_cache_key: _Whatever
    prompt_cache_options: _Whatever
    prompt_cache_retention: _Whatever
    safety_identifier: _Whatever
    service_tier: _Whatever
    stream_options: _Whatever
    user: _Whatever
