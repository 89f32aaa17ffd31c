"""Answers are taken apart the same way wherever they are cut, and as a plain parse has it."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm_fused.generation.batching.requests import GeneratedToken
from glm_fused.serve.answers import (
    AnswerParser,
    Reasoning,
    Text,
    Thinking,
    ToolArguments,
    ToolCallStart,
)
from glm_fused.serve.schemas import TYPES, read_json, value_types
from glm_fused.serve.tools import argument_json, call_text, read_tools

THINK = Thinking("<think>", "</think>")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "where": {"$ref": "#/$defs/place"},
        "unit": {"enum": ["C", "F"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "any": {},
    },
    "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}}}},
}
TOOLS = read_tools(
    [
        {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "stop"}},
    ]
)
MARKS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>",
]  # fmt: skip
WORDS = ["weather", "stop", "city", "days", "where", "note", "any", " ", "\n", "5", "-1.5e3", "é"]
WORDS += [
    '"',
    "\\",
    "null",
    "true",
    "[1, {}]",
    '{"lat": 2}',
    "<",
    "</",
    "<think",
    "arg_key>",
    "NaN",
]
WORDS += ["\U0001f600", "\x00", "1e999", "[" * 2000, "9" * 5000, '{"a":1,"a":2}', "\x1c"]


def parse(pieces, tools=TOOLS, thinking=THINK, **how):
    """What a parser says of an answer: reasoning, text, calls, and the order of what there was."""
    parser = AnswerParser(tools, thinking, **how)
    deltas = [delta for piece in pieces for delta in parser.feed_text(piece)]
    return joined(deltas + parser.finish())


def joined(deltas):
    found = []
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            assert delta.index == sum(one[0] == "call" for one in found)
            assert re.fullmatch("call_[0-9a-f]{24}", delta.id)
            found.append(["call", delta.name, ""])
        elif isinstance(delta, ToolArguments):
            assert delta.json_piece and found[-1][0] == "call"
            assert delta.index == sum(one[0] == "call" for one in found) - 1
            found[-1][2] += delta.json_piece
        else:
            kind = {Reasoning: "reasoning", Text: "text"}[type(delta)]
            assert delta.text
            if found and found[-1][0] == kind:
                found[-1][1] += delta.text
            else:
                found.append([kind, delta.text])
    return [(*one[:-1], json.loads(one[-1])) if one[0] == "call" else tuple(one) for one in found]


def plain_parse(text, tools=TOOLS, thinking=THINK, opened=False, closed=False):
    """The same by regular expressions over the whole answer."""
    outer = ([re.escape(mark) for mark in thinking or ()]) + (["<tool_call>"] if tools else [])
    found, mode, before = [], "reasoning" if opened else "text", "</think>" if closed else ""
    while True:
        match = re.search("|".join(outer), text) if outer else None
        part, mark = (text[: match.start()], match[0]) if match else (text, "")
        if before in ("</think>", "</tool_call>"):
            part = part.lstrip()
        if mark == "<tool_call>" or (mode == "text" and mark):
            part = part.rstrip()
        if part and found and found[-1][0] == mode:
            found[-1] = (mode, found[-1][1] + part)
        elif part:
            found.append((mode, part))
        if match is None:
            return found
        text, before = text[match.end() :], mark
        if mark == "<tool_call>":
            call, text, ended = plain_call(text)
            found += [call] if call else []
            before = "</tool_call>" if ended else "<tool_call>"
            while not ended and text:
                call, text, ended = plain_call(text)
                found += [call] if call else []
                before = "</tool_call>"
            if not ended:
                return found
        else:
            mode = "reasoning" if mark == "<think>" else "text"


def plain_call(text):
    """The call that a text begins with, what comes after it, and whether that is outside of it.

    A value ends at its own mark only, so they are taken out first.
    """
    match = re.match(r"(.*?)(?=<arg_key>|<arg_value>|</?tool_call>)", text, re.DOTALL)
    if match is None:
        return None, "", False
    name, arguments, rest = match[1].strip(), {}, text[match.end() :]
    if rest.startswith("<tool_call>"):  # the name has no end
        name = ""
    key = None
    while True:
        if match := re.match("</tool_call>", rest):
            ended, rest = True, rest[match.end() :]
            break
        if match := re.match("<tool_call>", rest):
            ended, rest = False, rest[match.end() :]
            break
        if match := re.match(
            r"<arg_key>(.*?)(?:</arg_key>|(?=<arg_value>|</?tool_call>))", rest, re.DOTALL
        ):
            whole = match[0].endswith("</arg_key>") or rest[match.end() :].startswith("<arg_value>")
            key = match[1].strip() if whole else None
        elif match := re.match(r"<arg_value>(.*?)(</arg_value>|\Z)", rest, re.DOTALL):
            if key is not None and key not in arguments:
                arguments[key] = plain_value(name, key, match[1])
            key = None
        elif rest.startswith("<arg_key>") or not rest:
            ended, rest = False, ""
            break
        else:
            match = re.match(r".+?(?=<arg_key>|<arg_value>|</?tool_call>|\Z)", rest, re.DOTALL)
        rest = rest[match.end() :]
    return (("call", name, arguments) if name else None), rest, ended


def plain_value(tool, key, text):
    kinds = {"city": str, "days": int, "exact": bool, "where": dict, "unit": str}
    try:
        value = json.loads(text, parse_constant=int)
    except (ValueError, RecursionError):
        return text
    kind = kinds.get(key) if tool == "weather" else None
    if kind is str or (kind is None and isinstance(value, str)):
        return text
    if kind is None and tool == "weather" and key == "note":
        return text if value is not None else None
    return value


texts = st.lists(st.sampled_from(MARKS + WORDS) | st.text(max_size=3), max_size=24).map("".join)
calls = st.builds(
    call_text,
    st.sampled_from(["weather", "stop", "other"]),
    st.dictionaries(
        st.sampled_from(["city", "days", "where", "note", "any"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text('<>/"\\ ab\n', max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner),
            max_leaves=3,
        ),
    ),
)
answers = texts | st.lists(texts | calls, max_size=4).map("".join)


def cut(text, places):
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@settings(max_examples=200, deadline=None)
@given(
    answers, st.lists(st.integers(0, 200)), st.booleans(), st.booleans(),
    st.sampled_from([(TOOLS, THINK), (TOOLS, None), ((), THINK), ((), None)]),
)  # fmt: skip
@example("<tool_call>weather<tool_call>stop</tool_call>", [], False, False, (TOOLS, None))
@example("<think>a <tool_call>stop</tool_call>\nb</think>\nc", [], False, False, (TOOLS, THINK))
@example("<tool_call>stop<arg_value>5</arg_value></tool_call> x ", [], True, False, (TOOLS, THINK))
@example("<tool_call>a<arg_key>b<arg_value>c", [], False, False, (TOOLS, THINK))
def test_any_text_cut_anywhere(text, places, opened, closed, formats):
    tools, thinking = formats
    how = {"opened": opened and thinking is not None}
    how["closed"] = closed and thinking is not None and not opened
    expected = plain_parse(text, tools, thinking, **how)
    assert parse([text], tools, thinking, **how) == expected
    assert parse(cut(text, places), tools, thinking, **how) == expected
    assert parse(list(text), tools, thinking, **how) == expected


def test_a_parser_that_holds_nothing_back_is_caught(monkeypatch):
    """The control of the test above: marks that come in two pieces would leak into the text."""
    text = "<think>a</think>b<tool_call>stop</tool_call>"
    expected = plain_parse(text)
    assert parse(cut(text, [10])) == expected
    monkeypatch.setattr("glm_fused.serve.answers._overlap", lambda text, mark: 0)
    assert parse([text]) == expected != parse(cut(text, [10]))


def test_space_around_thinking_and_calls_is_dropped_but_not_that_of_texts():
    text = "\n<think>\n so \n</think>\n\nHi,  there \n" + call_text("stop", {}) + "\n" + "bye \n"
    assert parse([text]) == [
        ("reasoning", "\n so \n"), ("text", "Hi,  there"), ("call", "stop", {}), ("text", "bye \n"),
    ]  # fmt: skip
    assert parse([text], (), None) == [("text", text)]


def test_a_call_within_thinking_which_goes_on_after_it():
    text = "so <tool_call>stop</tool_call> then</think>\nHi"
    assert parse([text], opened=True) == [
        ("reasoning", "so"), ("call", "stop", {}), ("reasoning", "then"), ("text", "Hi"),
    ]  # fmt: skip


def test_arguments_have_the_types_of_the_schema_and_texts_their_space():
    given = {
        "city": "  5\n", "days": 3, "exact": False, "where": {"lat": 1.5}, "unit": "5",
        "note": None, "any": [1, "x"], "more": 7,
    }  # fmt: skip
    assert parse([call_text("weather", given)]) == [("call", "weather", given)]
    assert parse([call_text("weather", {"note": '"null"'})])[0][2] == {"note": '"null"'}
    assert parse([call_text("weather", {"days": "soon"})])[0][2] == {"days": "soon"}


@pytest.mark.parametrize("kept", range(len(call_text("weather", {"city": 'a "b"', "days": 12}))))
def test_an_answer_that_ends_within_a_call_has_whole_json(kept):
    text = call_text("weather", {"city": 'a "b"', "days": 12})[:kept]
    found = parse([text])
    if "<arg_key>" not in text:
        assert all(one[0] == "text" for one in found)
        return
    ((kind, name, arguments),) = found
    assert (kind, name) == ("call", "weather")
    assert set(arguments) <= {"city", "days"}
    if text.endswith("<arg_value>12"):
        assert arguments == {"city": 'a "b"', "days": 12}


def test_texts_of_arguments_are_passed_on_as_they_come():
    parser = AnswerParser(TOOLS)
    parser.feed_text("<tool_call>weather<arg_key>city</arg_key><arg_value>")
    pieces = [parser.feed_text(piece) for piece in ("Par", 'i"', "s</arg", "_value>")]
    assert [[delta.json_piece for delta in deltas] for deltas in pieces] == [
        ["Par"], ['i\\"'], ["s"], ['"'],
    ]  # fmt: skip


def test_reasoning_tokens_are_counted():
    parser = AnswerParser(TOOLS, THINK, opened=True)
    for piece in ("a ", "b", "</think>", "\n", "c", "<think>", "d"):
        parser.feed(GeneratedToken(1, piece, None))
    assert parser.reasoning_tokens == 4


def test_several_calls_are_numbered():
    text = call_text("stop", {}) + "\n" + call_text("weather", {"days": 2}) + call_text("no", {})
    assert [one[1:] for one in parse([text])] == [
        ("stop", {}),
        ("weather", {"days": 2}),
        ("no", {}),
    ]
    parser = AnswerParser(TOOLS)
    parser.feed_text(text)
    assert parser.calls == 3


TYPED = [
    ({"type": "string"}, {"string"}),
    ({"type": ["string", "null"]}, {"string", "null"}),
    ({"type": "number"}, {"number", "integer"}),
    ({"enum": ["a", 1]}, {"string", "integer", "number"}),
    ({"const": True}, {"boolean"}),
    ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a"}]}, {"string", "array"}),
    ({"allOf": [{"type": ["string", "array"]}, {"$ref": "#/$defs/a"}]}, {"array"}),
    ({"$ref": "#/$defs/loop"}, TYPES),
    ({"$ref": "#/$defs/missing"}, TYPES),
    ({"$ref": "http://localhost/x"}, TYPES),
    ({"$ref": "#/$defs/deep"}, TYPES),
    ({"$ref": "#/$defs/twice"}, TYPES),
    ({}, TYPES),
    (True, TYPES),
    ("odd", TYPES),
    ({"type": "string", "enum": [5]}, TYPES),
]


@pytest.mark.parametrize(("schema", "types"), TYPED, ids=range(len(TYPED)))
def test_types_of_a_schema(schema, types):
    definitions = {
        "a": {"type": "array"},
        "loop": {"$ref": "#/$defs/loop"},
        "deep": {"anyOf": [{"$ref": "#/$defs/deep"}]},
        "twice": {"anyOf": [{"$ref": "#/$defs/twice"}] * 2},  # 2 to the power of the depth
    }
    assert value_types(schema, {"$defs": definitions}) == types


@settings(max_examples=100, deadline=None)
@given(texts, st.sampled_from([one[1] for one in TYPED]))
def test_an_argument_is_json_whatever_the_model_wrote(text, types):
    found = read_json(argument_json(text, frozenset(types)))
    assert found == text or "string" not in types or not isinstance(found, str)


BAD_TOOLS = [
    ("tools", "tools is 'tools'"),
    ([5], r"tools\[0\] is 5"),
    ([{"type": "web_search"}], r"tools\[0\] is"),
    ([{"type": "function", "function": {}}], "name is None"),
    ([{"type": "function", "function": {"name": "a<b"}}], "name is 'a<b'"),
    ([{"type": "function", "function": {"name": "a", "parameters": 5}}], "parameters of 'a' is 5"),
    ([{"type": "function", "function": {"name": "a", "strict": 1}}], "strict of 'a' is 1"),
    ([{"type": "function", "function": {"name": "a", "description": 1}}], "description of 'a'"),
    ([{"type": "function", "function": {"name": "a"}}] * 2, r"tools\[1\]: .*another tool 'a'"),
]


@pytest.mark.parametrize(("tools", "message"), BAD_TOOLS, ids=str)
def test_what_is_no_tool(tools, message):
    with pytest.raises(ValueError, match=message):
        read_tools(tools)


@pytest.mark.parametrize(
    ("prompt", "opened", "closed"),
    [
        ("<|assistant|><think>\n", True, False),
        ("<|assistant|><think></think>", False, True),
        ("<think> of me<|assistant|>", False, False),
        ("", False, False),
    ],
)
def test_where_a_prompt_leaves_its_model(prompt, opened, closed):
    assert THINK.left_by(prompt) == (opened, closed)
