"""What JSON schemas say of the types of values, as far as a tool's arguments need it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_DEEPEST = 32  # references and unions that are followed one into the other,
_MOST = 1000  # and how many of them in all, because each union may name the next one twice


def value_types(schema: Any, root: Any) -> frozenset[str]:
    """The JSON types that a value of ``schema`` may have; all of them where it names none.

    ``root`` is the schema whose definitions ``$ref`` names. What an unknown reference or a circle
    of them allows is unknown, too, which is every type.
    """
    return _types(schema, root, _DEEPEST, iter(range(_MOST)))


def _types(schema: Any, root: Any, depth: int, left: Iterator[int]) -> frozenset[str]:
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or not depth or next(left, None) is None:
        return TYPES
    found = TYPES
    if "type" in schema:
        named = schema["type"]
        found &= {str(name) for name in (named if isinstance(named, list) else [named])}
        found |= {"integer"} if "number" in found else set()
    if "const" in schema:
        found &= type_of(schema["const"])
    if isinstance(schema.get("enum"), list):
        found &= frozenset().union(*map(type_of, schema["enum"]))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            inner = (_types(one, root, depth - 1, left) for one in schema[key])
            found &= frozenset().union(*inner)
    if isinstance(schema.get("allOf"), list):
        for one in schema["allOf"]:
            found &= _types(one, root, depth - 1, left)
    return found or TYPES


def type_of(value: Any) -> frozenset[str]:
    """The JSON types of a value: a whole number is a "number" as well as an "integer"."""
    kinds: dict[type, set[str]] = {
        str: {"string"},
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        type(None): {"null"},
        dict: {"object"},
        list: {"array"},
    }
    return frozenset(kinds.get(type(value), set()))


def resolved(schema: Any, root: Any) -> Any:
    """The schema itself, or the one in ``root`` that its ``$ref`` leads to; None if none does."""
    for _ in range(_DEEPEST):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if reference is None:
            return schema
        schema = _pointed(str(reference), root)
    return None


def _pointed(reference: str, root: Any) -> Any:
    """What a JSON pointer within the document, such as ``#/$defs/Tree``, names."""
    if not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def read_json(text: str) -> Any:
    """The value of a JSON text; raises ValueError for any other, NaN and infinities included."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a schema, the schema itself among them, from the outside in."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
