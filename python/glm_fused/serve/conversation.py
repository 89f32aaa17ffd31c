"""From the messages and tools of a request to a prompt, and what its answer has to be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import glm47

from ..generation import chat
from ..generation.batching.requests import Constraint
from ..generation.prompts import encode
from ..models.decoder import Model
from ..validation import show
from .answers import AnswerParser, Thinking
from .call_grammar import answer_grammar
from .grammar import AfterThinking, Grammars
from .messages import read_messages, without_tools
from .tools import CALL, Tool, read_tools

_RESERVED = {"messages", "conversations", "tokenizer"}  # names of a template's own variables


@dataclass(frozen=True)
class Prepared:
    """A prompt, and what its answer has to be.

    Attributes:
        tokens: the prompt's.
        constraint: which tokens the answer may have; None: all.
        parser: takes the answer apart.
    """

    tokens: list[int]
    constraint: Constraint | None
    parser: AnswerParser
    _make: Callable[[], tuple[Constraint | None, AnswerParser]]

    def again(self) -> Prepared:
        """The same for another answer, with a constraint and a parser of its own."""
        return Prepared(self.tokens, *self._make(), self._make)


@dataclass(frozen=True)
class _Prompt:
    """A prompt's text, and where it leaves the model: within thinking, after it, or neither."""

    text: str
    opened: bool
    closed: bool


class Conversation:
    """Prepares the conversations of one model; threads may share it."""

    def __init__(self, model: Model, tokenizer: TokenizerWrapper):
        self._model, self._tokenizer = model, tokenizer
        self._grammars = Grammars(tokenizer, model.args.vocab_size)
        self._thinking = Thinking.of(tokenizer)
        apply = tokenizer._tokenizer.apply_chat_template
        self._reserved = _RESERVED | set(inspect.signature(apply).parameters)

    def prepare(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        template_args: Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        *,
        parallel_tool_calls: bool = True,
    ) -> Prepared:
        """The prompt of a conversation that the model is to go on with.

        Args:
            messages: as `glm_fused.serve.messages.read_messages` takes them.
            tools: definitions of functions, as OpenAI's chat API has them.
            tool_choice: "auto" (None is that, too), "none", "required", or ``{"type": "function",
                "function": {"name": …}}``, as there.
            template_args: arguments of the chat template, such as ``enable_thinking``.
            response_format: ``{"type": …}``: "text", "json_object", or "json_schema", with
                ``{"json_schema": {"schema": …}}``.
            parallel_tool_calls: whether an answer may have several calls.

        Raises:
            ValueError: something of this does not fit; the message names it, with what was found
                and expected.
        """
        read, known = read_messages(messages), read_tools(tools)
        choice = _choice(tool_choice, known)
        offered = () if choice == "none" else known
        arguments = {} if template_args is None else template_args
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"[messages] the template's arguments are {show(arguments)}, expected an object."
            )
        prompt = self._prompt(read, offered, dict(arguments))
        tokens = encode(
            self._model, self._tokenizer, chat.rendered_tokens(self._tokenizer, prompt.text)
        )
        grammar = answer_grammar(
            offered, choice, _schema(response_format), parallel_tool_calls, self._grammars.mark
        )
        may_think = arguments.get("enable_thinking") is not False

        def make() -> tuple[Constraint | None, AnswerParser]:
            constraint = None if grammar is None else self._constraint(grammar, prompt, may_think)
            parser = AnswerParser(
                offered, self._thinking, opened=prompt.opened, closed=prompt.closed
            )
            return constraint, parser

        return Prepared(tokens, *make(), make)

    def _prompt(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool], arguments: dict[str, Any]
    ) -> _Prompt:
        tokenizer = self._tokenizer
        if not tokenizer.has_chat_template:
            raise ValueError("[messages] the tokenizer has no chat template, which messages need.")
        for name in arguments:
            if name in self._reserved:
                raise ValueError(f"[messages] {show(name)} is no argument of chat templates.")
        if not tokenizer.has_tool_calling:
            messages = without_tools(messages, tools)
        elif tools:
            if tokenizer.tool_parser is not glm47.parse_tool_call:
                found = f"{tokenizer.tool_call_start}…{tokenizer.tool_call_end}"
                raise ValueError(
                    f"[tools] the chat template has calls as {found} in another format than GLM's,"
                    " which is the only one known."
                )
            arguments["tools"] = [tool.definition() for tool in tools]
        text = chat.render_text(tokenizer, messages, **arguments)
        if self._thinking is None:
            return _Prompt(text, False, False)
        if arguments.get("enable_thinking") is False and text.endswith(self._thinking.start):
            text += self._thinking.end  # templates of GLM-5.3 have no argument for it
        return _Prompt(text, *self._thinking.left_by(text))

    def _constraint(self, grammar: str, prompt: _Prompt, may_think: bool) -> Constraint:
        constraint = self._grammars.compile(grammar, "[grammar] what the answer has to be")
        if self._thinking is None or not (prompt.opened or (may_think and not prompt.closed)):
            return constraint
        tokenizer = self._tokenizer
        call = tokenizer.get_vocab().get(CALL)
        return AfterThinking(
            constraint,
            self._model.args.vocab_size,
            None if prompt.opened else tokenizer.think_start_id,
            tokenizer.think_end_id,
            [*tokenizer.eos_token_ids, *([] if call is None else [call])],
        )


def effort_arguments(effort: str | None) -> dict[str, Any]:
    """The template's arguments for a reasoning effort: "none" turns thinking off."""
    if effort is None:
        return {}
    if effort == "none":
        return {"enable_thinking": False}
    return {"enable_thinking": True, "reasoning_effort": effort}


def _choice(choice: Any, tools: Sequence[Tool]) -> str | Tool:
    """ "auto", "none", "required", or the tool that has to be called."""
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    if choice == "required":
        if not tools:
            raise ValueError("[tools] tool_choice is 'required', but there are no tools.")
        return "required"
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f"[tools] tool_choice is {show(choice)}, expected 'auto', 'none', 'required' or"
            ' {"type": "function", "function": {"name": …}}.'
        )
    for tool in tools:
        if tool.name == function.get("name"):
            return tool
    raise ValueError(
        f"[tools] tool_choice names {show(function.get('name'))}, expected one of the tools:"
        f" {', '.join(tool.name for tool in tools) or 'there are none'}."
    )


def _schema(response_format: Any) -> Any:
    """The JSON schema of the answer's text; None: any text."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        given = response_format.get("json_schema")
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if isinstance(schema, Mapping):
            return schema
        raise ValueError(
            "[response_format] json_schema.schema is"
            f" {'missing' if schema is None else show(schema)}, expected a JSON schema."
        )
    raise ValueError(
        f"[response_format] response_format is {show(response_format)}, expected the type 'text',"
        " 'json_object' or 'json_schema'."
    )
