"""What a constrained model writes fits its schema, whatever it would have liked to write."""

import json

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from test_answers import joined

from glm_fused.generation.batching.requests import GeneratedToken
from glm_fused.generation.ending import Text
from glm_fused.serve.conversation import Conversation

USER = [{"role": "user", "content": "def main():\n    "}]
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 4},
                "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
            },
            "required": ["name", "left"],
            "additionalProperties": False,
        }
    },
}


def record(**properties):
    required = [key for key in properties if not key.startswith("optional")]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "text": record(a=SHORT, optional_b=SHORT),
    "numbers": record(
        a={"type": "integer", "minimum": -5, "maximum": 1000},
        b={"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
    ),
    "enum": record(a={"enum": ["red", "green", 5, None, True, ["x"]]}, b={"const": 'é\n"/'}),
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 7},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer", "multipleOf": 3, "maximum": 99, "minimum": 0}, SHORT],
        "items": False,
        "minItems": 2,
    },
    "nested": record(a=record(b=record(c={"type": "array", "items": SHORT, "maxItems": 3}))),
    "union": {"anyOf": [record(kind={"const": "a"}, x=SHORT), record(kind={"const": "b"})]},
    "pattern": record(a={"type": "string", "pattern": "^[A-C]{2}-\\d{3}$"}),
    "format": record(a={"type": "string", "format": "ipv4"}),
    "tree": TREE,
    "map": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
        "maxProperties": 2,
    },
}
WEATHER = record(
    city=SHORT,
    days={"type": "integer", "minimum": 1, "maximum": 9},
    unit={"enum": ["C", "F"]},
    where={"$ref": "#/$defs/place"},
    note={"anyOf": [{"type": "string", "pattern": "^[a-z/]{1,5}$"}, {"type": "null"}]},
    optional_exact={"type": "boolean"},
    optional_size={"type": ["integer", "null"], "maximum": 50, "minimum": 0},
) | {"$defs": {"place": record(lat={"type": "number", "minimum": 0, "maximum": 9})}}


def tool(name, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


TOOLS = [tool("weather", WEATHER), tool("stop"), tool("tag", record(name=SHORT))]
PARAMETERS = {"weather": WEATHER, "stop": {}, "tag": record(name=SHORT)}


@pytest.fixture(scope="module")
def conversation(engine):
    return Conversation(engine.model, engine.tokenizer)


def generate(engine, prepared, seed, max_tokens=150, constrained=True, temp=1.0):
    """The answer's deltas, and why it ended: a scheduler in few lines."""
    mx.random.seed(seed)
    cache, deltas = engine.make_cache(), []
    text = Text(engine.tokenizer, (), max_tokens)
    logits = engine.step(mx.array([prepared.tokens]), cache)[0, -1]
    while True:
        if constrained and prepared.constraint is not None:
            logits = mx.where(prepared.constraint.allowed(), logits, -mx.inf)
        token = mx.random.categorical(logits / temp).item()
        if constrained and prepared.constraint is not None:
            prepared.constraint.accept(token)
        piece, reason = text.feed(token)
        deltas += prepared.parser.feed(GeneratedToken(token, piece, reason))
        if reason is not None:
            return deltas + prepared.parser.finish(), reason
        logits = engine.step(mx.array([[token]]), cache)[0, -1]


def ended(engine, prepared, seed, **how):
    """An answer that came to its end, as those of a model of this size do not always."""
    for more in range(20):
        deltas, reason = generate(engine, prepared.again(), seed + 100 * more, **how)
        if reason == "stop":
            return joined(deltas)
    pytest.fail("no answer ended")


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_fits_its_schema(engine, conversation, name):
    schema = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    prepared = conversation.prepare(USER, response_format=form)
    found = set()
    for seed in range(2):
        ((kind, text),) = ended(engine, prepared, seed)
        assert kind == "text"
        validator.validate(json.loads(text))
        found.add(text)
    assert len(found) > 1 or name in ("union", "map")  # whose values may well be equal
    deltas, _ = generate(engine, prepared.again(), 0, constrained=False, max_tokens=20)
    with pytest.raises(ValueError):  # what the model would have written is no JSON
        json.loads("".join(delta.text for delta in deltas))


def test_any_json_object(engine, conversation):
    prepared = conversation.prepare(USER, response_format={"type": "json_object"})
    for seed in range(2):
        ((_, text),) = ended(engine, prepared, seed, max_tokens=400)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_fit_their_schemas(engine, conversation, parallel):
    prepared = conversation.prepare(USER, TOOLS, "required", parallel_tool_calls=parallel)
    names, most = [], 0
    for seed in range(6):
        deltas, reason = generate(engine, prepared.again(), seed, max_tokens=120)
        calls = joined(deltas)
        for kind, name, arguments in calls[: len(calls) - (reason == "length")]:
            assert kind == "call"
            jsonschema.validate(arguments, PARAMETERS[name])
            names.append(name)
        most = max(most, len(calls))
    assert len(names) > 1 and (most > 1) == parallel


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_tool_is_called_once(engine, conversation, name):
    choice = {"type": "function", "function": {"name": name}}
    prepared = conversation.prepare(USER, TOOLS, choice)
    ((kind, called, arguments),) = ended(engine, prepared, 1)
    assert (kind, called) == ("call", name)
    jsonschema.validate(arguments, PARAMETERS[name])


def test_json_or_calls(engine, conversation):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMAS["array"]}}
    prepared = conversation.prepare(USER, TOOLS, response_format=form)
    first = np.flatnonzero(np.array(prepared.constraint.allowed()))
    starts = {engine.tokenizer.decode([int(token)])[0] for token in first}
    assert starts == {"<", "["}


def test_calls_after_text_of_strict_tools(engine, conversation):
    """Free text may go on and end; a call that it comes to has to fit."""
    strict = [tool("tag", record(name={"enum": ["on", "off"]}), strict=True)]
    assert conversation.prepare(USER, [tool("tag")]).constraint is None
    prepared = conversation.prepare(USER, strict)
    _, reason = generate(engine, prepared.again(), 3, max_tokens=20)
    assert reason == "length"
    good = "Well.\n<tool_call>tag<arg_key>name</arg_key><arg_value>off</arg_value></tool_call> ok"
    assert refused(engine, prepared.again().constraint, good) is None
    assert refused(engine, prepared.again().constraint, good.replace("off", "of")) is not None
    assert refused(engine, prepared.again().constraint, good + good[5:]) is None
    once = conversation.prepare(USER, strict, parallel_tool_calls=False)
    assert refused(engine, once.constraint, good.removesuffix(" ok")) is None
    assert refused(engine, once.again().constraint, good) is not None


def refused(engine, constraint, text):
    """The first token of a text that a constraint does not allow, or None."""
    for token in engine.tokenizer.encode(text):
        if not constraint.allowed()[token].item():
            return token
        constraint.accept(token)
    return None


BAD = {
    "not": ({"type": "object", "not": {}}, "not"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "if": ({"if": {"type": "string"}, "then": {}}, "if"),
    "type": ({"type": "frob"}, "frob"),
    "format": ({"type": "string", "format": "frob"}, "frob"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "remote": ({"$ref": "http://localhost:1/x"}, "localhost"),
    "missing": ({"$ref": "#/$defs/x"}, "defs/x"),
    "empty": ({"type": "array", "minItems": 5, "maxItems": 2}, "minItems"),
    "counts": ({"type": "string", "pattern": "^((a{300}){300})$"}, "counts up to 90000"),
    "size": ({"enum": [f"value {i}" for i in range(20000)]}, "characters"),
    "lenient": ({"type": "object", "not": {}, "x-guidance": {"lenient": True}}, "not"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_makes_no_grammar(conversation, name):
    schema, word = BAD[name]
    form = {"type": "json_schema", "json_schema": {"schema": {**schema}}}
    with pytest.raises(ValueError, match=r"^\[(response_format|grammar)\]") as error:
        conversation.prepare(USER, response_format=form)
    assert word in str(error.value)
    assert len(str(error.value)) < 500


BAD_PARAMETERS = {
    "union": (
        record(a={"$ref": "#/$defs/a"}) | {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}},
        "'a': anyOf leads to another more than 8 times",
    ),
    "wide": (
        record(a={"$ref": "#/$defs/7"})
        | {"$defs": {str(i): {"anyOf": [{"$ref": f"#/$defs/{i - 1}"}] * 9} for i in range(8)}},
        "more than 2000 values",
    ),
    "reference": ({"$ref": "#/$defs/x"}, r"\$ref names nothing"),
    "properties": ({"properties": 5}, "properties is no object"),
    "counts": (record(a={"type": "string", "pattern": "(a{99}){999}"}), "counts up to 98901"),
    "pattern": (record(a={"type": "string", "pattern": "(?=a)b"}), "look-around"),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_parameters_that_make_no_grammar(conversation, name):
    parameters, message = BAD_PARAMETERS[name]
    assert conversation.prepare(USER, [tool("x", parameters)])  # which is no matter without one
    with pytest.raises(ValueError, match=message):
        conversation.prepare(USER, [tool("x", parameters)], "required")


def test_strict_tools_hold_every_keyword_and_others_what_can_be_held(conversation):
    parameters = record(a={"type": "array", "uniqueItems": True})
    assert conversation.prepare(USER, [tool("x", parameters)], "required").constraint is not None
    with pytest.raises(ValueError, match="uniqueItems"):
        conversation.prepare(USER, [tool("x", parameters, strict=True)], "required")
