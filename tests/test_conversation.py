"""Prompts are what the checkpoint's template makes of messages, and answers begin where it ends."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answers import joined
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glm_fused import Engine, load
from glm_fused.generation.batching.requests import GeneratedToken
from glm_fused.serve.conversation import Conversation, effort_arguments
from glm_fused.serve.messages import read_messages
from glm_fused.serve.tools import CALL, call_text

# What GLM's templates do, in little: tools, thinking, calls, results.
TEMPLATE = """[gMASK]<sop>
{%- if tools %}<|system|># Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>
{%- else %}<|{{ m.role }}|>
{%- if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>{{ call.function.name }}
{%- for k, v in call.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>
{{- v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor %}
{%- endif %}{% endfor %}<|assistant|>ENDING"""
ENDINGS = {
    "opens": "<think>",
    "may": "{{ '</think>' if enable_thinking is defined and not enable_thinking }}",
    "switch": "{{ '</think>' if not enable_thinking else '<think>' }}",
}
CONTROL = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"]
MARKS += ["<arg_value>", "</arg_value>"]
ENDS = ["<|endoftext|>", "<|user|>", "<|observation|>"]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "maximum": 9, "minimum": 0},
                "b": {"type": "string"},
            },
            "required": ["a"],
        },
    },
}
CHAT = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Add.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"a": 1, "b": "x y"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "user", "content": "Well?"},
]
USER = [{"role": "user", "content": "Hi."}]


def write_glm_tokenizer(folder, ending, special):
    """A tokenizer of bytes with GLM's marks, which are control tokens or not."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *CONTROL])
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(MARKS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        chat_template=TEMPLATE.replace("ENDING", ENDINGS[ending]),
    ).save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "control"])
def glm(request, tmp_path_factory):
    """Conversations of a small GLM, by how its template ends a prompt."""
    found = {}
    for ending in ENDINGS:
        folder = tmp_path_factory.mktemp(ending)
        tokenizer = write_glm_tokenizer(folder, ending, request.param)
        config = tiny_config(vocab_size=320)
        config["eos_token_id"] = [tokenizer.token_to_id(end) for end in ENDS]
        write_checkpoint(folder, config)
        found[ending] = Conversation(*load(folder))
    return found


@pytest.fixture(scope="module")
def demo():
    with Engine("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(demo):
    return Conversation(demo.model, demo.tokenizer)


def text_of(conversation, prepared):
    return conversation._tokenizer.decode(prepared.tokens)


def feed(parser, text):
    deltas = [delta for letter in text for delta in parser.feed(GeneratedToken(1, letter, None))]
    return joined(deltas + parser.finish())


def test_a_template_that_knows_tools_gets_all_of_a_chat(glm):
    conversation = glm["opens"]
    text = text_of(conversation, conversation.prepare(CHAT, [TOOL]))
    assert text == (
        f"[gMASK]<sop><|system|># Tools\n{json.dumps(TOOL)}\n<|system|>Be brief.<|user|>1 + 1?"
        "<|assistant|><think>Add.</think><tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value>"
        "<arg_key>b</arg_key><arg_value>x y</arg_value></tool_call><|observation|><tool_response>2"
        "</tool_response><|user|>Well?<|assistant|><think>"
    )
    assert "# Tools" not in text_of(conversation, conversation.prepare(CHAT, [TOOL], "none"))


@pytest.mark.parametrize("tools", [[TOOL], None])
def test_where_an_answer_begins(glm, tools):
    answer = "so</think>\nHi"
    whole = [("reasoning", "so"), ("text", "Hi")]
    for ending, arguments, expected in (
        ("opens", {}, whole),
        ("switch", {"enable_thinking": True}, whole),
        ("may", {}, [("text", "soHi")]),
        ("opens", {"enable_thinking": False}, [("text", "soHi")]),
        ("switch", {"enable_thinking": False}, [("text", "soHi")]),
    ):
        prepared = glm[ending].prepare(USER, tools, template_args=arguments)
        assert feed(prepared.parser, answer) == expected, (ending, arguments)
        closed = arguments.get("enable_thinking") is False
        assert text_of(glm[ending], prepared).endswith("</think>") == closed
        assert feed(prepared.again().parser, answer) == expected
    assert feed(glm["may"].prepare(USER, tools).parser, f"\n<think>{answer}") == whole


def allowed(conversation, constraint):
    """Which tokens may come, as texts."""
    tokens = np.flatnonzero(np.array(constraint.allowed())).tolist()
    return {conversation._tokenizer.convert_ids_to_tokens(token) for token in tokens}


def accept(conversation, constraint, text):
    for token in conversation._tokenizer.encode(text, add_special_tokens=False):
        assert constraint.allowed()[token].item(), token
        constraint.accept(token)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_required_call_comes_after_thinking(glm, choice):
    """No call and no end come within it, and after it nothing but the call."""
    conversation = glm["opens"]
    constraint = conversation.prepare(USER, [TOOL], choice).constraint
    free = allowed(conversation, constraint)
    assert not free & {*ENDS, CALL} and {"a", "</think>"} <= free
    accept(conversation, constraint, "a <b> {")
    assert allowed(conversation, constraint) == free
    accept(conversation, constraint, "</think>")
    assert allowed(conversation, constraint) <= {CALL, "<"}
    accept(conversation, constraint, call_text("add", {"a": 7, "b": "x </y> z"}))
    found = allowed(conversation, constraint)
    assert set(ENDS) <= found <= {*ENDS, CALL, "<"}


def test_calls_of_strict_tools_between_texts(glm):
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    for ending, arguments in (("may", {"enable_thinking": False}), ("opens", None)):
        conversation = glm[ending]
        constraint = conversation.prepare(USER, [strict], None, arguments).constraint
        call = call_text("add", {"a": 7, "b": "x"})
        accept(conversation, constraint, "</think>" * (ending == "opens") + f"Well, {call}{call}")
        assert {"a", CALL, *ENDS} <= allowed(conversation, constraint)
        accept(conversation, constraint, f"and {call[: call.index('7')]}")
        assert allowed(conversation, constraint) == set("0123456789")
        once = conversation.prepare(
            USER, [strict], None, arguments, parallel_tool_calls=False
        ).constraint
        accept(conversation, once, "</think>" * (ending == "opens") + f"Well, {call}")
        assert allowed(conversation, once) == set(ENDS)


def test_thinking_is_left_to_a_model_that_may_open_it_itself(glm):
    conversation = glm["may"]
    form = {"type": "json_object"}
    first = conversation.prepare(USER, response_format=form).constraint
    assert allowed(conversation, first) == {"{", "<think>"}
    accept(conversation, first, '<think>{"</think>{}')
    assert allowed(conversation, first) == set(ENDS)
    plain = conversation.prepare(USER, response_format=form).constraint
    accept(conversation, plain, '{"a": 1')
    assert "<think>" not in allowed(conversation, plain)
    without = conversation.prepare(USER, None, None, {"enable_thinking": False}, form).constraint
    assert allowed(conversation, without) == {"{"}


def test_a_template_without_tools_gets_them_as_text(demo):
    conversation = Conversation(demo.model, demo.tokenizer)
    text = text_of(conversation, conversation.prepare(CHAT, [TOOL]))
    assert text.startswith("# Tools\n") and f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert text.endswith(
        f"Be brief.1 + 1?{call_text('add', {'a': 1, 'b': 'x y'})}"
        "<tool_response>2</tool_response>Well?"
    )
    assert text_of(conversation, conversation.prepare(USER)) == "Hi."
    raw = demo.encode([{"role": "user", "content": "Hi."}])
    assert conversation.prepare(USER, tool_choice="none").tokens == raw


def test_a_template_with_calls_of_another_format(glm):
    tokenizer = glm["opens"]._tokenizer
    other = Conversation(glm["opens"]._model, tokenizer)
    kept, tokenizer._tool_parser = tokenizer._tool_parser, lambda text, tools: None
    try:
        assert other.prepare(USER)
        with pytest.raises(ValueError, match=r"^\[tools\] the chat template has calls as <tool_ca"):
            other.prepare(USER, [TOOL])
    finally:
        tokenizer._tool_parser = kept


def test_reasoning_efforts():
    assert effort_arguments(None) == {}
    assert effort_arguments("none") == {"enable_thinking": False}
    assert effort_arguments("low") == {"enable_thinking": True, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hi", r"messages\[0\] is 'hi', expected an object"),
        ({"content": "x"}, r"messages\[0\].role is None, expected system, developer, user, assi"),
        ({"role": "robot", "content": "x"}, "role is 'robot'"),
        ({"role": ["user"], "content": "x"}, r"role is \['user'\]"),
        ({"role": "user"}, r"messages\[0\].content is None, expected a text"),
        ({"role": "user", "content": 5}, "content is 5"),
        ({"role": "user", "content": ["x"]}, r"content\[0\] is 'x', expected"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            r"content\[0\] is of type 'image_url', expected .*: the model takes text alone",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\] is \{'type': 'text'\}"),
        ({"role": "assistant", "reasoning_content": 5}, "reasoning_content is 5"),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls is 5, expected a list"),
        ({"role": "assistant", "tool_calls": [{"name": "x"}]}, r"tool_calls\[0\] is"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]},
            r"tool_calls\[0\].function.arguments is '\{', expected a JSON object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "[1]"}}]},
            "expected a JSON object",
        ),
        ({"role": "tool", "tool_call_id": 5, "content": "x"}, "tool_call_id is 5"),
    ],
)
def test_what_is_no_message(message, error):
    with pytest.raises(ValueError, match=rf"^\[messages\] .*{error}"):
        read_messages([message])


@pytest.mark.parametrize("messages", [[], "hi", None, {"role": "user"}])
def test_what_is_no_list_of_messages(messages):
    with pytest.raises(ValueError, match=r"^\[messages\] "):
        read_messages(messages)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"tool_choice": "required"}, "tool_choice is 'required', but there are no tools"),
        ({"tool_choice": "maybe", "tools": [TOOL]}, "tool_choice is 'maybe'"),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice is"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": [TOOL]},
            "tool_choice names 'sub', expected one of the tools: add",
        ),
        ({"response_format": "json"}, "response_format is 'json'"),
        ({"response_format": {"type": "xml"}}, "response_format is"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "schema is 1"),
        ({"template_args": {"chat_template": "x"}}, "'chat_template' is no argument of chat tem"),
        ({"template_args": ["x"]}, r"template's arguments are \['x'\], expected an object"),
        ({"template_args": {"messages": []}}, "'messages' is no argument"),
        ({"template_args": {"tools": []}}, "'tools' is no argument"),
    ],
    ids=str,
)
def test_what_a_request_may_not_ask(demo, given, error):
    with pytest.raises(ValueError, match=error):
        Conversation(demo.model, demo.tokenizer).prepare(USER, **given)


def test_text_that_is_none(demo):
    with pytest.raises(ValueError, match=r"\[chat\] .* does not take"):
        Conversation(demo.model, demo.tokenizer).prepare([{"role": "user", "content": "\ud800"}])


def test_a_prompt_beyond_the_context(demo):
    with pytest.raises(ValueError, match="expected 1 to 8191"):
        Conversation(demo.model, demo.tokenizer).prepare([{"role": "user", "content": "x " * 9000}])


def test_a_mask_is_of_the_logits(demo):
    """The model may have more logits than the tokenizer has tokens; those never come."""
    form = {"type": "json_object"}
    conversation = Conversation(demo.model, demo.tokenizer)
    mask = conversation.prepare(USER, response_format=form).constraint.allowed()
    assert (mask.shape, mask.dtype) == ((demo.model.args.vocab_size,), mx.bool_)


_WORDS = [
    "",
    "type",
    "string",
    "object",
    "$ref",
    "#/$defs/a",
    "#",
    "a",
    "user",
    "\ud800",
    "((",
    "{",
]
_KEYS = ["type", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "properties", "required"]
_KEYS += ["items", "pattern", "minLength", "minimum", "additionalProperties", "role", "content"]
_KEYS += ["function", "name", "parameters", "strict", "arguments", "enable_thinking", "", "\ud800"]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, -1, 10**400, 1.5]) | st.sampled_from(_WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3)
    ),
    max_leaves=8,
)
_ASKED = {
    "messages": CHAT,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "add"}},
    "template_args": {"enable_thinking": True},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"schema": {"type": "object", "properties": {"a": {"enum": ["b", 1]}}}},
    },
    "parallel_tool_calls": False,
}


def replaced(draw, value):
    """The value with one thing in it, or all of it, in place of which comes something else."""
    if not value or not isinstance(value, (dict, list)) or draw(st.integers(0, 9)) == 0:
        return draw(_VALUES)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    copy = value.copy()
    copy[key] = replaced(draw, value[key])
    return copy


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_is_asked_is_prepared_or_refused(plain, data):
    asked = dict(_ASKED)
    if data.draw(st.booleans()):
        del asked["tool_choice"]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(asked)))
        asked[name] = replaced(data.draw, asked[name])
    try:
        prepared = plain.prepare(**asked)
        if prepared.constraint is not None:
            assert prepared.constraint.allowed().any().item()
    except ValueError as error:
        assert str(error).startswith(("[messages]", "[tools]", "[response_format]", "[grammar]",
                                      "[chat]", "[prompt]"))  # fmt: skip
