"""Bodies of Anthropic's messages API, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from .openai_fields import MOST_STOPS, only, option

_UNKNOWN = only([], because="only Anthropic's own service has it")
_Absent = Annotated[Any, _UNKNOWN]
_Stop = Annotated[str, Field(min_length=1)]
_Whatever = Annotated[Any, Field(default=None)]  # of Anthropic's own service; it changes no answer


class _Part(BaseModel):
    """Something within a body; hints that change no answer, such as cache_control, are skipped."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Text(_Part):
    """A text."""

    type: Literal["text"]
    text: str


class Thinking(_Part):
    """What the model thought before it answered."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinking(_Part):
    """Thinking that only the service that wrote it can read."""

    type: Literal["redacted_thinking"]


class ToolUse(_Part):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class _PlainText(_Part):
    type: Literal["text"]
    data: str


class Document(_Part):
    """A document of plain text."""

    type: Literal["document"]
    source: _PlainText
    title: str | None = None

    @property
    def text(self) -> str:
        """The document with its title."""
        return f"{self.title}\n\n{self.source.data}" if self.title else self.source.data


def _kind(block: object) -> object:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


def _one_of(*kinds: str) -> Discriminator:
    """Finds a block by its type, and says which there are where it has none of them."""
    expected = f"a block of type {', '.join(kinds[:-1])} or {kinds[-1]}"
    return Discriminator(_kind, custom_error_type="block", custom_error_message=expected)


def _as_blocks(content: object) -> object:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("expected a text or a list of blocks")
    return content


_TaggedText = Annotated[Text, Tag("text")]
_TaggedDocument = Annotated[Document, Tag("document")]
_Texts = Annotated[list[Text], BeforeValidator(_as_blocks)]
_Readable = Annotated[_TaggedText | _TaggedDocument, _one_of("text", "document")]


class ToolResult(_Part):
    """What a call of a tool gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[_Readable], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    is_error: bool | None = None


_Asked = Annotated[
    _TaggedText | _TaggedDocument | Annotated[ToolResult, Tag("tool_result")],
    _one_of("text", "document", "tool_result"),
]
_Answered = Annotated[
    _TaggedText
    | Annotated[Thinking, Tag("thinking")]
    | Annotated[RedactedThinking, Tag("redacted_thinking")]
    | Annotated[ToolUse, Tag("tool_use")],
    _one_of("text", "thinking", "redacted_thinking", "tool_use"),
]


class UserMessage(_Part):
    """A message of the user, or results of tools."""

    role: Literal["user"]
    content: Annotated[list[_Asked], BeforeValidator(_as_blocks)]


class AssistantMessage(_Part):
    """An answer of the model."""

    role: Literal["assistant"]
    content: Annotated[list[_Answered], BeforeValidator(_as_blocks)]


class SystemMessage(_Part):
    """An instruction within the conversation."""

    role: Literal["system"]
    content: _Texts


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else getattr(message, "role", None)


_ROLES = Discriminator(
    _role,
    custom_error_type="role",
    custom_error_message="a message of the role user, assistant or system",
)
_Message = Annotated[
    Annotated[UserMessage, Tag("user")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[SystemMessage, Tag("system")],
    _ROLES,
]


class Tool(_Part):
    """A tool of the client's own."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(_Part):
    """Whether and which tools have to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(_Part):
    """Whether the model thinks before it answers; its budget is a hint that GLM has no use for."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(_Part):
    """The JSON schema of an answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    """How much the model is to think, and the form of its answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class CountTokensBody(BaseModel):
    """The body of count_tokens: all that becomes part of a prompt."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    messages: list[_Message] = Field(min_length=1)
    system: _Texts = Field(default_factory=list)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    betas: _Whatever
    billing_policy: _Whatever
    cache_control: _Whatever
    compaction: _Absent = None
    context_management: _Whatever
    mcp_servers: _Absent = None
    speed: _Whatever
    user_profile_id: _Whatever
    workspace_id: _Whatever


class MessagesBody(CountTokensBody):
    """The body of a request for a message."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: list[_Stop] | None = Field(default=None, max_length=MOST_STOPS)
    temperature: Annotated[float | None, option("temp")] = None
    top_p: Annotated[float | None, option("top_p")] = None
    top_k: Annotated[int | None, option("top_k")] = None
    container: _Absent = None
    diagnostics: _Whatever
    fallback_credit_token: _Whatever
    fallbacks: _Whatever
    inference_geo: _Whatever
    metadata: _Whatever
    service_tier: _Whatever
    thread: Any = None
