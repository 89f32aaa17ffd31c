"""OpenAI's own client against the responses API, whole and streamed."""

import json
import random
from typing import Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import get_type_hints

from glm_fused.serve.answers import Reasoning, Text, ToolArguments, ToolCallStart
from glm_fused.serve.errors import ApiError
from glm_fused.serve.openai_fields import checked
from glm_fused.serve.responses_events import ResponseEvents, usage
from glm_fused.serve.responses_requests import InputTokensBody, ResponsesBody
from glm_fused.serve.responses_store import ResponseStore, Stored
from glm_fused.serve.responses_turn import answered, listed_logprobs, turn_of

CODE = "def fibonacci(n):\n"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather at a place",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}
OTHER = {"type": "function", "name": "stop"}


def body(**fields):
    return checked(ResponsesBody, {"model": "demo", "input": CODE} | fields)


# What a body asks for


def test_every_published_field_is_known():
    for published, kind in (
        (ResponseCreateParamsBase, ResponsesBody),
        (InputTokenCountParams, InputTokensBody),
    ):
        missing = get_type_hints(published).keys() - kind.model_fields.keys()
        assert not missing, (published, missing)
    assert "stream" in ResponsesBody.model_fields


def call(call_id, arguments="{}"):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def test_items_become_messages_of_the_chat_template():
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "How warm"},
                {"type": "input_text", "text": "is it?"},
            ],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I look."}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "get_weather",
            "arguments": '{"place": "Ås"}',
        },
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "3 °C"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "none"}],
        },
        {"type": "function_call", "call_id": "c3", "name": "get_weather", "arguments": "{}"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "???"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "And now?"},
    ]
    turn = turn_of(body(input=items, instructions="Be kind.", tools=[WEATHER]))
    assert turn.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How warm\nis it?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "I look.",
            "tool_calls": [call("c1", '{"place": "Ås"}'), call("c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3 °C"},
        {"role": "tool", "tool_call_id": "c2", "content": "none"},
        {"role": "assistant", "content": "", "tool_calls": [call("c3")]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "And now?"},
    ]
    (tool,) = turn.tools
    assert tool["function"] == {
        key: WEATHER[key] for key in ("name", "description", "parameters", "strict")
    }


@pytest.mark.parametrize(
    ("choice", "names", "expected"),
    [
        (None, ["get_weather", "stop"], "auto"),
        ("required", ["get_weather", "stop"], "required"),
        ("none", ["get_weather", "stop"], "none"),
        (
            {"type": "function", "name": "stop"},
            ["get_weather", "stop"],
            {"type": "function", "function": {"name": "stop"}},
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "stop"}],
            },
            ["stop"],
            "required",
        ),
    ],
)
def test_tool_choice(choice, names, expected):
    turn = turn_of(body(tools=[WEATHER, OTHER], tool_choice=choice))
    assert [tool["function"]["name"] for tool in turn.tools] == names
    assert turn.tool_choice == expected
    assert turn.parallel
    assert not turn_of(body(tools=[WEATHER], parallel_tool_calls=False)).parallel


def test_effort_and_the_form_of_the_answer():
    assert turn_of(body()).template_args == {}
    none = turn_of(body(reasoning={"effort": "none", "summary": "auto"})).template_args
    assert none == {"enable_thinking": False}
    high = turn_of(body(reasoning={"effort": "high"}, chat_template_kwargs={"a": 1})).template_args
    assert high == {"enable_thinking": True, "reasoning_effort": "high", "a": 1}
    schema = {"type": "object"}
    form = {"type": "json_schema", "name": "tree", "schema": schema, "strict": True}
    expected = {"name": "tree", "schema": schema, "strict": True}
    found = turn_of(body(text={"format": form, "verbosity": "low"})).response_format
    assert found == {"type": "json_schema", "json_schema": expected}
    assert turn_of(body(text={"format": {"type": "json_object"}})).response_format == {
        "type": "json_object"
    }
    assert turn_of(body(text={"format": {"type": "text"}})).response_format is None
    assert listed_logprobs(body()) is None
    assert listed_logprobs(body(include=["message.output_text.logprobs"])) == 0
    assert listed_logprobs(body(top_logprobs=3)) == 3


# What a response looks like

STREAM_EVENT = TypeAdapter(ResponseStreamEvent)
HEAD = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "demo",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
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


def response(deltas, incomplete=None):
    """The events of a response, and the response itself, both checked against published types."""
    made = ResponseEvents(HEAD)
    events = made.start()
    cuts = sorted(random.choices(range(len(deltas) + 1), k=3))
    for first, last in zip([0, *cuts], [*cuts, len(deltas)], strict=True):
        events += made.feed(deltas[first:last])
    events += made.finish(incomplete, usage(9, 4, 12, 3))
    for event in events:
        STREAM_EVENT.validate_python(event, strict=True)
    Response.model_validate(made.response)
    return events, made.response


def test_items_of_a_response():
    _, whole = response(DELTAS)
    kinds = ["reasoning", "message", "function_call", "function_call", "message"]
    assert [item["type"] for item in whole["output"]] == kinds
    assert {item["status"] for item in whole["output"]} == {"completed"}
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "I look."}]
    assert whole["output"][1]["content"][0]["text"] == "Let me see."
    assert json.loads(whole["output"][2]["arguments"]) == {"place": "Ås"}
    assert whole["usage"]["total_tokens"] == 21
    assert len({item["id"] for item in whole["output"]}) == 5
    assert answered(whole["output"]) == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "I look.",
            "tool_calls": [call("call_1", '{"place": "Ås"}'), call("call_2")],
        },
        {"role": "assistant", "content": "Done."},
    ]


def test_events_are_numbered_and_each_item_ends_before_the_next_begins():
    events, whole = response(DELTAS)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert (
        events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    )
    assert events[-1]["type"] == "response.completed" and events[-1]["response"] == whole
    opened, texts = None, dict.fromkeys(range(5), "")
    for event in events[2:-1]:
        if event["type"] == "response.output_item.added":
            assert opened is None
            opened = event["output_index"]
            assert event["item"]["status"] == "in_progress"
            assert not event["item"].get("content") and not event["item"].get("arguments")
        assert event["output_index"] == opened
        if event["type"].endswith(".delta"):
            texts[opened] += event["delta"]
        elif event["type"] == "response.output_item.done":
            assert event["item"] == whole["output"][opened]
            opened = None
    assert list(texts.values()) == ["I look.", "Let me see.", '{"place": "Ås"}', "{}", "Done."]


def test_an_answer_that_is_cut_says_so():
    events, whole = response(DELTAS[:3], "max_output_tokens")
    assert events[-1]["type"] == "response.incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]


def test_an_answer_that_fails_says_so():
    made = ResponseEvents(HEAD)
    error = ApiError(500, "an expert cannot be read")
    events = [*made.start(), *made.feed(DELTAS[:2]), *made.fail(error)]
    event = STREAM_EVENT.validate_python(events[-1])
    assert event.type == "response.failed"
    assert event.response.error.message == "an expert cannot be read"


def test_log_probabilities_go_with_the_text_that_their_tokens_make_ready():
    made = ResponseEvents(HEAD)
    entries = [{"token": t, "bytes": [], "logprob": -1.0, "top_logprobs": []} for t in "abcd"]
    assert made.feed([Reasoning("x")], entries[:1])[-1]["type"] == "response.reasoning_text.delta"
    assert made.feed([], entries[1:2]) == []
    events = made.feed([Text("bc")], entries[2:3])
    assert events[-1]["logprobs"] == entries[1:3]
    made.feed([Text("d")], entries[3:])
    assert made.response["output"][1]["content"][0]["logprobs"] == entries[1:]


# What is stored


def stored(response_id, size):
    return Stored({"id": response_id}, [{"role": "user", "content": "x" * size}])


def test_a_store_forgets_what_was_not_used_for_longest():
    store = ResponseStore(limit=4000)
    for response_id in "abc":
        store.put(stored(response_id, 1000))
    assert store.get("a").response["id"] == "a"
    store.put(stored("d", 1000))
    assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"]
    store.put(stored("a", 10))
    store.put(stored("e", 1000))
    assert [key for key in "abcde" if store.get(key)] == ["a", "c", "d", "e"]
    assert store.delete("c") and not store.delete("c")
    store.put(stored("f", 5000))
    assert [key for key in "abcdef" if store.get(key)] == []
    store.put(stored("g", 3000))
    assert store.get("g")


# OpenAI's client against a server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(**fields):
    return {"model": "demo", "input": CODE, "max_output_tokens": 16} | fields


def test_a_response_has_the_text_of_the_engine(client, engine):
    answer = client.responses.create(**asked(max_output_tokens=24))
    expected = engine.generate(CODE, max_tokens=24)
    assert answer.output_text == expected.text
    assert answer.status == ("incomplete" if expected.finish_reason == "length" else "completed")
    assert answer.usage.input_tokens == expected.prompt_tokens
    assert answer.usage.output_tokens == len(expected.tokens)
    assert (answer.model, answer.object) == ("demo", "response")


@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_a_stream_has_the_text_of_the_whole_response(client, tokens):
    code = f"class A{random.randrange(1000)}:\n"
    fields = asked(max_output_tokens=tokens, input=code)
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        events = list(stream)
        final = events[-1].response
    assert (
        "".join(e.delta for e in events if e.type == "response.output_text.delta")
        == whole.output_text
    )
    assert final.output_text == whole.output_text
    assert (final.status, final.incomplete_details) == (whole.status, whole.incomplete_details)
    assert final.usage.output_tokens == whole.usage.output_tokens == tokens


def test_a_response_goes_on_from_one_before(client, engine):
    first = client.responses.create(**asked(instructions="import os\n"))
    second = client.responses.create(**asked(input="# more\n", previous_response_id=first.id))
    chat = [
        {"role": "user", "content": CODE},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "# more\n"},
    ]
    assert second.output_text == engine.generate(chat, max_tokens=16).text
    assert second.usage.input_tokens == len(engine.encode(chat))
    assert client.responses.retrieve(first.id).output == first.output
    counted = client.responses.input_tokens.count(
        model="demo", input="# more\n", previous_response_id=first.id
    )
    assert counted.input_tokens == second.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="There is no stored response"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked(previous_response_id=first.id))
    assert (caught.value.param, caught.value.code) == (
        "previous_response_id",
        "previous_response_not_found",
    )
    private = client.responses.create(**asked(store=False))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(private.id)


def test_log_probabilities_are_those_of_chat_completions(client):
    answer = client.responses.create(
        **asked(include=["message.output_text.logprobs"], top_logprobs=2, temperature=0)
    )
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": CODE}],
        max_tokens=16,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    found = [entry.model_dump() for entry in answer.output[0].content[0].logprobs]
    assert found == [entry.model_dump() for entry in chat.choices[0].logprobs.content]
    assert "".join(entry["token"] for entry in found) == answer.output_text
    plain = client.responses.create(**asked())
    assert plain.output[0].content[0].logprobs == []


def test_errors_have_openais_shape(client, server):
    with pytest.raises(openai.NotFoundError, match="'gpt-5', which is not served") as caught:
        client.responses.create(**asked(model="gpt-5"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="input: found 5") as caught:
        client.responses.create(**asked(input=5))
    assert caught.value.param == "input"
    with pytest.raises(openai.BadRequestError, match="context of") as caught:
        client.responses.create(**asked(max_output_tokens=10**6))
    assert caught.value.param == "max_output_tokens"


def test_a_client_that_leaves_ends_its_response(client, server):
    with client.responses.stream(**asked(max_output_tokens=800)) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
    server.idle()


LIGHT = {
    "type": "function",
    "name": "set_light",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "room": {"enum": ["hall", "attic"]},
            "level": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["room", "level"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_a_function_that_has_to_be_called_is(client, seed):
    fields = asked(max_output_tokens=200, tools=[OTHER, LIGHT], parallel_tool_calls=False)
    fields |= {"tool_choice": {"type": "function", "name": "set_light"}}
    fields |= {"instructions": f"# {seed}\n"}
    whole = client.responses.create(**fields)
    (made,) = whole.output
    assert (made.type, made.name, whole.status) == ("function_call", "set_light", "completed")
    given = json.loads(made.arguments)
    assert given.keys() == {"room", "level"}
    assert given["room"] in ("hall", "attic") and type(given["level"]) is int
    with client.responses.stream(**fields) as stream:
        pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(pieces) == made.arguments == final.output[0].arguments
    output = {"type": "function_call_output", "call_id": made.call_id, "output": "# done\n"}
    answer = client.responses.create(**asked(input=[output], previous_response_id=whole.id))
    assert answer.output[0].type == "message"
    again = client.responses.create(
        **asked(
            input=[{"role": "user", "content": CODE}, made.model_dump(), output],
            max_output_tokens=16,
        )
    )
    assert again.output_text == answer.output_text  # whoever keeps the conversation


class Box(BaseModel):
    """What the model has to fill in."""

    width: int = Field(ge=0, le=9)
    kind: Literal["big", "small"]


def test_an_answer_has_the_form_of_its_schema(client):
    answer = client.responses.parse(**asked(max_output_tokens=100), text_format=Box)
    assert isinstance(answer.output_parsed, Box)
    assert json.loads(answer.output_text) == answer.output_parsed.model_dump()
    plain = client.responses.create(**asked(max_output_tokens=100))
    with pytest.raises(ValueError):  # the control: by itself the model does nothing like it
        Box.model_validate_json(plain.output_text)
    free = client.responses.create(
        **asked(max_output_tokens=40, text={"format": {"type": "json_object"}})
    )
    assert free.output_text.lstrip().startswith("{")
