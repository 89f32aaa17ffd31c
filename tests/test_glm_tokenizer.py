"""Calls and JSON in tokens as GLM's: bytes merged across marks of JSON, and control tokens."""

import json

import jsonschema
import pytest
from conftest import tiny_config, write_checkpoint
from mlx_lm.tool_parsers import glm47
from test_answers import joined
from test_conversation import CONTROL, ENDINGS, ENDS, MARKS, TEMPLATE, USER
from test_grammar import PARAMETERS, SCHEMAS, TOOLS, ended, generate, refused, tool
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from glm_fused import Engine
from glm_fused.generation.batching.requests import GeneratedToken
from glm_fused.serve.conversation import Conversation
from glm_fused.serve.tools import CALL, CALL_END, call_text

# How GLM's tokenizer splits a text before it merges bytes: words, up to three digits, signs, space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    json.dumps({"name": "x", "size": [1, 20, 300], "on": True, "é": {"a": None, "b": "\n"}}),
    '{"a": "b"}, {"c": "d"}]}}\n{"kind":"a","x":"y"},"z":["p","q"]}',
    "weather city days unit where lat note null true false red green and the town of Oslo.",
    "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>\n",
]


def write_glm_tokenizer(folder):
    """A tokenizer that is trained on a few texts, with GLM's marks as control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", *CONTROL, *MARKS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        chat_template=TEMPLATE.replace("ENDING", ENDINGS["switch"]),
    ).save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm")
    tokenizer = write_glm_tokenizer(folder)
    config = tiny_config(vocab_size=704)
    config["eos_token_id"] = [tokenizer.token_to_id(end) for end in ENDS]
    write_checkpoint(folder, config)
    with Engine(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def conversation(engine):
    return Conversation(engine.model, engine.tokenizer)


def at_once(conversation, tools=None, choice=None, form=None, **more):
    """What is prepared for an answer without thinking."""
    return conversation.prepare(USER, tools, choice, {"enable_thinking": False}, form, **more)


def test_tokens_hold_several_marks_of_json_and_each_mark_of_glm_is_one(engine):
    tokenizer = engine.tokenizer
    for mark in MARKS:
        (token,) = tokenizer.encode(mark, add_special_tokens=False)
        assert tokenizer._tokenizer.added_tokens_decoder[token].special
    names = tokenizer.convert_ids_to_tokens(
        tokenizer.encode('{"a": "b"}, {"c":', add_special_tokens=False)
    )
    assert {'{"', '":', '"},'} & set(names), names


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_are_what_mlx_lms_parser_reads(engine, conversation, seed):
    prepared = at_once(conversation, TOOLS, "required", parallel_tool_calls=False)
    pieces, parser = [], prepared.parser
    real = parser.feed
    parser.feed = lambda event: (pieces.append(event), real(event))[1]
    deltas, reason = generate(engine, prepared, seed, max_tokens=400)
    assert reason == "stop"
    ((kind, name, arguments),) = joined(deltas)
    assert kind == "call"
    jsonschema.validate(arguments, PARAMETERS[name])
    text = "".join(piece.text for piece in pieces)
    assert text.startswith(CALL) and text.endswith(CALL_END)
    read = glm47.parse_tool_call(text.removeprefix(CALL).removesuffix(CALL_END), TOOLS)
    assert read["name"] == name and read["arguments"].keys() == arguments.keys()


@pytest.mark.parametrize("name", ["text", "enum", "nested", "union", "tree", "map"])
def test_json_fits_its_schema(engine, conversation, name):
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name]}}
    prepared = at_once(conversation, form=form)
    ((kind, text),) = ended(engine, prepared, 1)
    assert kind == "text"
    jsonschema.validate(json.loads(text), SCHEMAS[name])
    deltas, _ = generate(engine, prepared.again(), 1, constrained=False, max_tokens=20)
    with pytest.raises(ValueError):  # the control: what comes without a grammar is no JSON
        json.loads("".join(delta.text for delta in deltas if hasattr(delta, "text")))


def test_the_tokens_that_a_text_usually_has_are_allowed(engine, conversation):
    """What a model writes are these, not any others that have the same text."""
    tags = {"type": "object", "properties": {"name": {"type": "string"}, "on": {"type": "boolean"}}}
    tags |= {"required": ["name"], "additionalProperties": False}
    tagged = [tool("tag", tags)]
    good = call_text("tag", {"name": '{"a": "b"}, </arg> <|x|>', "on": True})
    constraint = conversation.prepare(USER, tagged, "required").constraint
    assert refused(engine, constraint, f"I think of it: [1]</think>{good}") is None
    bad = good.replace("true", "tru ")
    again = conversation.prepare(USER, tagged, "required").constraint
    assert refused(engine, again, f"I think of it: [1]</think>{bad}") is not None
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMAS["text"]}}
    text = '{"a": "x\\n", "optional_b": "é"}'
    assert refused(engine, at_once(conversation, form=form).constraint, text) is None
    assert refused(engine, at_once(conversation, form=form).constraint, text[:-1] + ",") is not None


def test_a_call_in_whole_tokens_is_taken_apart(engine, conversation):
    prepared = conversation.prepare(USER, TOOLS)
    text = f"so{CALL}stop{CALL_END}</think>Hi{call_text('tag', {'name': 'é €'})}"
    tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    detokenizer, deltas = engine.tokenizer.detokenizer, []
    for token in tokens:
        detokenizer.add_token(token)
        deltas += prepared.parser.feed(GeneratedToken(token, detokenizer.last_segment, None))
    detokenizer.finalize()
    deltas += prepared.parser.feed(GeneratedToken(0, detokenizer.last_segment, "stop"))
    assert joined(deltas + prepared.parser.finish()) == [
        ("reasoning", "so"),
        ("call", "stop", {}),
        ("text", "Hi"),
        ("call", "tag", {"name": "é €"}),
    ]
