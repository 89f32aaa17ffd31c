"""Anthropic's own client against the server: messages, whole and streamed, and their tokens."""

import json
import random
from typing import Literal

import anthropic
import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from anthropic.types.beta.message_create_params import MessageCreateParamsBase as BetaParams
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from pydantic import BaseModel, Field, TypeAdapter
from served import served
from typing_extensions import get_type_hints

from glm_fused.serve.answers import Reasoning, Text, ToolArguments, ToolCallStart
from glm_fused.serve.anthropic_events import MessageEvents, usage
from glm_fused.serve.anthropic_requests import CountTokensBody, MessagesBody
from glm_fused.serve.anthropic_turn import check_messages, options_of, shows_thinking, turn_of
from glm_fused.serve.openai_fields import checked

CODE = "def fibonacci(n):\n"
HELLO = [{"role": "user", "content": CODE}]
WEATHER = {
    "name": "get_weather",
    "description": "Weather at a place",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["place"],
    },
}


def body(kind=MessagesBody, **fields):
    usual = {"model": "demo", "messages": HELLO}
    if kind is CountTokensBody:
        return checked(kind, usual | fields)
    return checked(kind, usual | {"max_tokens": 16} | fields, check_messages)


# What a body asks for


def test_every_published_field_is_known():
    for published, kind in (
        (MessageCreateParamsBase, MessagesBody),
        (BetaParams, MessagesBody),
        (MessageCountTokensParams, CountTokensBody),
    ):
        missing = get_type_hints(published).keys() - kind.model_fields.keys()
        assert not missing, (published, missing)
    assert {"stream", "temperature", "top_p", "top_k"} <= MessagesBody.model_fields.keys()


def test_a_line_for_bills_is_no_part_of_the_prompt():
    texts = ["x-anthropic-billing-header: cc_version=2.1; cch=1f;", "Be brief."]
    system = [{"type": "text", "text": text} for text in texts]
    for given, found in ((system, "Be brief."), (system[1:] + system[:1], "Be brief.")):
        assert turn_of(body(system=given)).messages[0] == {"role": "system", "content": found}
    assert [m["role"] for m in turn_of(body(system=system[:1])).messages] == ["user"]
    kept = turn_of(body(system=f"Of {texts[0]}")).messages[0]["content"]
    assert kept == f"Of {texts[0]}"  # the control: only what begins with it is left out


def test_a_conversation_with_tools_becomes_messages_of_the_chat_template():
    cache = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "Be brief.", **cache}, {"type": "text", "text": "Be kind."}]
    messages = [
        {"role": "user", "content": "How warm is it?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look it up.", "signature": "x"},
                {"type": "redacted_thinking", "data": "???"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"place": "Ås"}},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {}, **cache},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "3 °C", **cache},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "place"}],
                },
                {"type": "text", "text": "And tomorrow?"},
                {
                    "type": "document",
                    "title": "Notes",
                    "source": {"type": "text", "media_type": "text/plain", "data": "rain"},
                },
            ],
        },
        {"role": "system", "content": "Use metric units."},
        {"role": "user", "content": ""},
    ]
    turn = turn_of(body(system=system, messages=messages, tools=[WEATHER]))
    calls = [
        {"id": i, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        for i, arguments in (("t1", '{"place": "Ås"}'), ("t2", "{}"))
    ]
    assert turn.messages == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "How warm is it?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "I look it up.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "t1", "content": "3 °C"},
        {"role": "tool", "tool_call_id": "t2", "content": "no\nplace"},
        {"role": "user", "content": "And tomorrow?\nNotes\n\nrain"},
        {"role": "system", "content": "Use metric units."},
        {"role": "user", "content": ""},
    ]
    function = {
        "name": "get_weather",
        "description": "Weather at a place",
        "parameters": WEATHER["input_schema"],
    }
    assert turn.tools == [{"type": "function", "function": function}]


def test_results_of_tools_stay_where_they_are_between_texts():
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t"}
    mixed = [{"type": "text", "text": "a"}, result, {"type": "text", "text": "b"}]
    messages = [*HELLO, {"role": "assistant", "content": [use]}, {"role": "user", "content": mixed}]
    found = turn_of(body(messages=messages)).messages[2:]
    assert [m["role"] for m in found] == ["user", "tool", "user"]
    assert [m["content"] for m in found] == ["a", "", "b"]
    failed = result | {"is_error": True}
    messages[-1] = {"role": "user", "content": [failed]}
    assert turn_of(body(messages=messages)).messages[-1]["content"] == "The tool failed."


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        (
            {"type": "tool", "name": "get_weather"},
            {"type": "function", "function": {"name": "get_weather"}},
            True,
        ),
    ],
)
def test_tool_choice(choice, expected, parallel):
    turn = turn_of(body(tools=[WEATHER], tool_choice=choice))
    assert (turn.tool_choice, turn.parallel) == (expected, parallel)


def test_thinking_and_effort_become_arguments_of_the_template():
    def args(**fields):
        return turn_of(body(**fields)).template_args

    assert args() == {"enable_thinking": False}
    assert args(thinking={"type": "disabled"}) == {"enable_thinking": False}
    budget = {"type": "enabled", "budget_tokens": 2048}
    assert args(thinking=budget) == {"enable_thinking": True}
    effort = {"effort": "high"}
    thinking = {"type": "adaptive", "display": "omitted"}
    expected = {"enable_thinking": True, "reasoning_effort": "high"}
    assert args(thinking=thinking, output_config=effort) == expected
    assert shows_thinking(body(thinking=budget))
    assert not shows_thinking(body(thinking=thinking))


def test_options_and_the_form_of_the_answer():
    found = options_of(body(temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["###"]))
    assert found == {"temp": 0.5, "top_p": 0.9, "top_k": 40, "stop": ("###",)}
    assert set(options_of(body()).values()) == {None}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    expected = {"name": "answer", "schema": schema, "strict": True}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        format = turn_of(body(**fields)).response_format
        assert format == {"type": "json_schema", "json_schema": expected}


# What a message looks like

STREAM_EVENT = TypeAdapter(RawMessageStreamEvent)
DELTAS = [
    Reasoning("I "),
    Reasoning("look."),
    Text("Let me"),
    Text(" see."),
    ToolCallStart(0, "call_1", "get_weather"),
    ToolArguments(0, '{"place": '),
    ToolArguments(0, '"Ås"}'),
    ToolCallStart(1, "call_2", "get_weather"),
    ToolArguments(1, "{}"),
    Text("Done."),
]


def message(deltas, show_thinking=True, reason="tool_use"):
    """The events of a message, and the message itself, both checked against published types."""
    made = MessageEvents("msg_1", "demo", show_thinking)
    events = made.start(usage(9, 4, 0, 0))
    cuts = sorted(random.choices(range(len(deltas) + 1), k=3))
    for first, last in zip([0, *cuts], [*cuts, len(deltas)], strict=True):
        events += made.feed(deltas[first:last])
    events += made.finish(reason, None, usage(9, 4, 12, 3))
    for event in events:
        STREAM_EVENT.validate_python(event, strict=True)
    Message.model_validate(made.message)
    return events, made.message


def test_events_make_the_message_in_anthropics_own_accumulator():
    from anthropic.lib.streaming._messages import accumulate_event

    events, whole = message(DELTAS)
    snapshot, bufs = None, {}
    for event in events:
        snapshot = accumulate_event(
            event=STREAM_EVENT.validate_python(event), current_snapshot=snapshot, json_bufs=bufs
        )
    found = snapshot.model_dump(exclude_unset=True)
    assert found["content"] == whole["content"]
    assert found["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert found["usage"]["output_tokens"] == 12
    assert found["usage"]["input_tokens"] == 5 and found["usage"]["cache_read_input_tokens"] == 4
    assert [block["type"] for block in whole["content"]] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
        "text",
    ]
    assert whole["content"][2]["input"] == {"place": "Ås"}


def test_blocks_come_one_after_another():
    events, _ = message(DELTAS)
    opened = None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert opened is None
            opened = event["index"]
        assert event["index"] == opened
        if event["type"] == "content_block_stop":
            opened = None
    starts = [e["index"] for e in events if e["type"] == "content_block_start"]
    assert starts == [0, 1, 2, 3, 4]
    ends = ("message_start", "message_delta", "message_stop")
    assert [e["type"] for e in (events[0], *events[-2:])] == list(ends)
    first = next(e for e in events if e["type"] == "content_block_start")
    assert first["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}


def test_thinking_that_nobody_wants_to_read_has_no_text():
    events, whole = message(DELTAS, show_thinking=False)
    assert whole["content"][0] == {"type": "thinking", "thinking": "", "signature": "unsigned"}
    assert "thinking_delta" not in json.dumps(events)
    assert "thinking_delta" in json.dumps(message(DELTAS)[0])


def test_an_answer_of_nothing_has_no_blocks():
    events, whole = message([], reason="end_turn")
    assert whole["content"] == []
    assert len(events) == 3


# Anthropic's client against a server


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def asked(**fields):
    return {"model": "demo", "messages": HELLO, "max_tokens": 16} | fields


def test_a_message_has_the_text_of_the_engine(client, engine):
    answer = client.messages.create(**asked(max_tokens=24))
    expected = engine.generate(HELLO, max_tokens=24)
    assert answer.content[0].text == expected.text
    assert answer.stop_reason == (
        "max_tokens" if expected.finish_reason == "length" else "end_turn"
    )
    assert (
        answer.usage.input_tokens + answer.usage.cache_read_input_tokens == expected.prompt_tokens
    )
    assert answer.usage.output_tokens == len(expected.tokens)
    assert (answer.model, answer.role, answer.type) == ("demo", "assistant", "message")


def test_system_and_earlier_turns_are_part_of_the_prompt(client, engine):
    messages = [*HELLO, {"role": "assistant", "content": "    pass\n"}, *HELLO]
    system = [{"type": "text", "text": "import os\n", "cache_control": {"type": "ephemeral"}}]
    answer = client.messages.create(**asked(system=system, messages=messages))
    chat = [{"role": "system", "content": "import os\n"}, *messages]
    expected = engine.generate(chat, max_tokens=16)
    assert answer.content[0].text == expected.text
    assert expected.text != engine.generate(messages, max_tokens=16).text  # the control


@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_a_stream_has_the_text_of_the_whole_message(client, tokens):
    code = f"class A{random.randrange(1000)}:\n"
    fields = asked(max_tokens=tokens, messages=[{"role": "user", "content": code}])
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content)
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens == tokens


def test_events_on_the_wire_have_their_names(server):
    status, headers, found = server.request(
        "POST", "/v1/messages?beta=true", asked(stream=True, max_tokens=200)
    )
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [event.split("\n") for event in found.decode().split("\n\n") if event]
    names = [line[0].removeprefix("event: ") for line in lines]
    documents = [json.loads(line[1].removeprefix("data: ")) for line in lines]
    assert names == [document["type"] for document in documents]
    assert names[0] == "message_start" and names[1] == "ping"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_delta") >= 4


def test_a_stop_sequence_is_said(client, engine):
    text = engine.generate(HELLO, max_tokens=60).text
    stop = text[20:23]
    other = "\0never"
    fields = asked(max_tokens=60, stop_sequences=[other, stop])
    answer = client.messages.create(**fields)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text[: text.index(stop)]
    with client.messages.stream(**fields) as stream:
        assert stream.get_final_message().stop_sequence == stop
    answer = client.messages.create(**asked(stop_sequences=[other]))
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)


def test_tokens_are_counted_as_a_message_takes_them(client):
    fields = {"system": "import os\n", "messages": HELLO}
    count = client.messages.count_tokens(model="demo", **fields).input_tokens
    used = client.messages.create(model="demo", max_tokens=1, **fields).usage
    assert count == used.input_tokens + used.cache_read_input_tokens
    more = client.messages.count_tokens(model="demo", messages=HELLO).input_tokens
    assert more < count


def test_more_tokens_than_the_context_has_room_for_end_with_it(client, engine, monkeypatch):
    prompt = len(engine.encode(HELLO))
    monkeypatch.setattr(type(engine.model), "context", prompt + 5)
    answer = client.messages.create(**asked(max_tokens=20_000))
    assert answer.usage.output_tokens == 5
    assert answer.stop_reason == "model_context_window_exceeded"
    assert client.messages.create(**asked(max_tokens=5)).stop_reason == "max_tokens"
    monkeypatch.setattr(type(engine.model), "context", prompt)
    with pytest.raises(anthropic.BadRequestError, match=f"is {prompt} tokens, expected 1 to"):
        client.messages.create(**asked())


def test_errors_have_anthropics_shape(client, server):
    with pytest.raises(anthropic.NotFoundError, match="'claude', which is not served") as caught:
        client.messages.create(**asked(model="claude"))
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="messages: found 'hi'") as caught:
        client.messages.create(**asked(messages="hi"))
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        status, _, found = server.request(
            "POST", path, raw=b"{", headers={"Content-Type": "application/json"}
        )
        assert (status, found["error"]["type"]) == (400, "invalid_request_error")


def test_a_key_and_a_limit_on_the_size_hold_here_too(engine):
    with served(engine, api_key="secret", max_body_bytes=2000) as server:

        def create(key, **fields):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as client:
                return client.messages.create(**asked(max_tokens=1, **fields))

        with pytest.raises(anthropic.AuthenticationError) as caught:
            create("wrong")
        assert caught.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.APIStatusError) as caught:
            create("secret", system="x" * 2000)
        assert caught.value.status_code == 413
        assert caught.value.body["error"]["type"] == "request_too_large"
        assert create("secret").usage.output_tokens == 1


def test_a_client_that_leaves_ends_its_message(client, server):
    with client.messages.stream(**asked(max_tokens=800)) as stream:
        next(iter(stream.text_stream))
    server.idle()


def test_the_model_is_listed_in_this_apis_shape_too(client, engine):
    (listed,) = client.models.list()
    assert ModelInfo.model_validate(listed.model_dump(), strict=True).id == "demo"
    assert (listed.type, listed.max_input_tokens) == ("model", engine.context)
    assert client.models.retrieve("demo") == listed


def test_the_beta_client_with_what_claude_code_sends(client):
    answer = client.beta.messages.create(
        **asked(),
        betas=["interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
        system=[{"type": "text", "text": "# You code.\n", "cache_control": {"type": "ephemeral"}}],
        metadata={"user_id": "user_1"},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "medium"},
        extra_body={"temperature": 1},
    )
    assert answer.usage.output_tokens == 16


LIGHT = {
    "name": "set_light",
    "input_schema": {
        "type": "object",
        "properties": {
            "room": {"enum": ["hall", "attic"]},
            "level": {"type": "integer", "minimum": 0, "maximum": 99},
            "on": {"type": "boolean"},
        },
        "required": ["room", "level"],
        "additionalProperties": False,
    },
}
STOP = {"name": "stop", "input_schema": {"type": "object", "properties": {}}}


def check_light(given):
    assert given["room"] in ("hall", "attic") and type(given["level"]) is int
    assert given.keys() <= {"room", "level", "on"}


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_a_tool_that_has_to_be_called_is(client, seed):
    choice = {"type": "tool", "name": "set_light", "disable_parallel_tool_use": True}
    fields = asked(max_tokens=200, tools=[STOP, LIGHT], tool_choice=choice)
    fields["system"] = f"# {seed}\n"
    whole = client.messages.create(**fields)
    (use,) = whole.content
    assert (use.type, use.name, whole.stop_reason) == ("tool_use", "set_light", "tool_use")
    check_light(use.input)
    with client.messages.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert final.content[0].input == use.input and final.stop_reason == "tool_use"


def test_any_tool_and_what_follows_its_result(client, engine):
    fields = asked(max_tokens=200, tools=[STOP, LIGHT])
    forced = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(**fields, tool_choice=forced)
    (use,) = first.content
    assert use.name in ("stop", "set_light")
    if use.name == "set_light":
        check_light(use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "# done\n"}
    messages = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**fields | {"messages": messages, "max_tokens": 20})
    assert answer.content[0].type == "text" and answer.stop_reason != "tool_use"
    none = client.messages.create(**fields | {"max_tokens": 20}, tool_choice={"type": "none"})
    assert none.content[0].text == engine.generate(HELLO, max_tokens=20).text


class Box(BaseModel):
    """What the model has to fill in."""

    width: int = Field(ge=0, le=9)
    kind: Literal["big", "small"]


def test_an_answer_has_the_form_of_its_schema(client):
    answer = client.messages.parse(**asked(max_tokens=100), output_format=Box)
    assert isinstance(answer.parsed_output, Box)
    assert json.loads(answer.content[0].text) == answer.parsed_output.model_dump()
    plain = client.messages.create(**asked(max_tokens=100))
    with pytest.raises(ValueError):  # the control: by itself the model does nothing like it
        Box.model_validate_json(plain.content[0].text)
