"""Fields that do not fit, in the dialects that become a `Turn`: an error that names the field."""

import pytest

from glm_fused.serve import anthropic_turn, responses_turn
from glm_fused.serve.anthropic_requests import MessagesBody
from glm_fused.serve.errors import ApiError
from glm_fused.serve.openai_fields import checked
from glm_fused.serve.responses_requests import ResponsesBody

HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"name": "get_weather", "input_schema": {"type": "object"}}
FUNCTION = {"type": "function", "name": "get_weather"}


def anthropic_turn_of(**fields):
    usual = {"model": "demo", "messages": HELLO, "max_tokens": 16}
    body = checked(MessagesBody, usual | fields, anthropic_turn.check_messages)
    return anthropic_turn.turn_of(body)


def responses_turn_of(**fields):
    return responses_turn.turn_of(checked(ResponsesBody, {"model": "demo", "input": "hi"} | fields))


def user(*blocks):
    return [{"role": "user", "content": list(blocks)}]


BOTH = [
    ({"model": None}, "model"),
    ({"temperature": -1}, "temperature"),
    ({"temprature": 1}, "temprature"),
]
FIELDS = {
    anthropic_turn_of: [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": user("x")}, "messages[0].content[0]"),
        ({"messages": user({"type": "text"})}, "messages[0].content[0].text"),
        ({"messages": user({"type": "text", "text": 5})}, "messages[0].content[0].text"),
        ({"messages": user({"type": "image", "source": {}})}, "messages[0].content[0]"),
        ({"messages": user({"type": "tool_use"})}, "messages[0].content[0]"),
        (
            {"messages": user({"type": "tool_result", "tool_use_id": "t9"})},
            "messages[0].content[0].tool_use_id",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": "{"}]}, "messages[1].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "16"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"stop_sequences": ["x", ""]}, "stop_sequences[1]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"mcp_servers": [{"url": "https://a.example"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
    ],
    responses_turn_of: [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]},
            "input[0].call_id",
        ),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_p": 2}, "top_p"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
}


@pytest.mark.parametrize(
    ("turn_of", "fields", "param"),
    [(turn_of, *case) for turn_of, cases in FIELDS.items() for case in [*BOTH, *cases]],
)
def test_what_does_not_fit_is_an_error_that_names_the_field(turn_of, fields, param):
    with pytest.raises(ApiError) as caught:
        turn_of(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(f"{param}: ")
    assert turn_of().messages == HELLO  # which fits
