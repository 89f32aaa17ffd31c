"""OpenAI's client against the server: calls of tools, and answers of a form."""

import json

import openai
import pytest

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up {what}.",
            "parameters": {
                "type": "object",
                "properties": {what: {"enum": values}, "days": {"enum": [1, 2, 3]}},
                "required": [what, "days"],
                "additionalProperties": False,
            },
        },
    }
    for name, what, values in (
        ("weather", "city", ["Oslo", "Paris"]),
        ("stock", "symbol", ["A", "B", "C"]),
    )
]
HI = [{"role": "user", "content": "Weather in Oslo?"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def chat(client, **fields):
    given = {"model": "demo", "messages": HI, "max_tokens": 200} | fields
    return client.chat.completions.create(**given)


def fits(call):
    """Whether a call is one of the tools', with arguments that its schema allows."""
    (tool,) = [t["function"] for t in TOOLS if t["function"]["name"] == call.function.name]
    arguments = json.loads(call.function.arguments)
    properties = tool["parameters"]["properties"]
    return arguments.keys() == properties.keys() and all(
        value in properties[key]["enum"] for key, value in arguments.items()
    )


def joined(chunks):
    """The calls of a stream, as they are put together by whoever reads it."""
    calls = {}
    for chunk in chunks:
        for piece in chunk.choices[0].delta.tool_calls or ():
            call = calls.setdefault(piece.index, {"id": piece.id, "name": "", "arguments": ""})
            call["name"] += piece.function.name or ""
            call["arguments"] += piece.function.arguments or ""
    return [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_call_that_is_required_comes_whole_or_in_pieces(client, seed):
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": seed}
    options["parallel_tool_calls"] = False
    choice = chat(client, **options).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert fits(call) and choice.message.content is None
    chunks = list(chat(client, **options, stream=True))
    (streamed,) = joined(chunks)
    assert streamed["name"] == call.function.name
    assert streamed["arguments"] == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_function_that_is_named_is_called(client):
    for tool in TOOLS:
        name = tool["function"]["name"]
        choice = {"type": "function", "function": {"name": name}}
        calls = chat(client, tools=TOOLS, tool_choice=choice).choices[0].message.tool_calls
        assert [call.function.name for call in calls] == [name] and all(map(fits, calls))


def test_a_conversation_goes_on_with_what_the_tool_said(client):
    first = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    message = first.choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "4 °C, rain"}
    for said in (message, message.model_dump()):  # as programs send it, with nulls
        answer = chat(client, messages=[*HI, said, result], tools=TOOLS, max_tokens=5)
        assert answer.choices[0].message.tool_calls is None
        assert answer.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_schema_is_kept_to_by_every_one_of_n_answers(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["x", "yy"]}, "size": {"type": "boolean"}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    described = {"name": "thing", "schema": schema, "strict": True}
    form = {"type": "json_schema", "json_schema": described}
    answer = chat(client, response_format=form, n=4, temperature=1.5, seed=8)
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert found.keys() == {"name", "size"}
        assert found["name"] in ("x", "yy") and type(found["size"]) is bool
        assert choice.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="schema"):
        broken = described | {"schema": {"type": "no such type"}}
        chat(client, response_format={"type": "json_schema", "json_schema": broken})
