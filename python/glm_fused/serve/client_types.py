"""The clients' own published types of requests, made strict enough to check a body with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Optional,
    Required,
    Union,
    get_args,
    get_origin,
)

from openai._types import SequenceNotStr
from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema
from typing_extensions import TypedDict, get_type_hints, is_typeddict

_LISTS = (Iterable, Sequence, SequenceNotStr)
_KEYS = ("role", "type")  # by which typed dictionaries of a union are told apart


class Published:
    """Has pydantic check a field as a published type: ``Annotated[dict, Published(…)]``."""

    def __init__(self, published: Any):
        self._published = published

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return handler.generate_schema(strict(self._published))


def strict(published: Any) -> Any:
    """The published type, to be checked at once and without conversions, with clear errors.

    Pydantic takes an ``Iterable`` on trust until it is iterated, so lists stand in its place. Of a
    union of typed dictionaries it would name what each lacks; here their "role" or "type" says
    which is meant. A key that may be left out may be null, which many programs send for it, and
    keys that are not published stay: servers have their own, such as "reasoning_content".
    """
    origin: Any = get_origin(published)
    args = get_args(published)
    if is_typeddict(published):
        return _dictionary(published)
    if origin in (Annotated, Required, NotRequired):
        return strict(args[0])
    if origin in (Union, UnionType):
        return _union([strict(member) for member in args])
    if origin in _LISTS:
        return list[strict(args[0])]  # type: ignore[misc]
    if origin in (list, dict):
        return origin[tuple(strict(arg) for arg in args)]
    return published


@cache
def _dictionary(published: Any) -> Any:
    keys: dict[str, Any] = {}
    for key, hint in get_type_hints(published, include_extras=True).items():
        origin: Any = get_origin(hint)
        if origin is Required:  # __required_keys__ misses those of postponed annotations
            keys[key] = Required[strict(get_args(hint)[0])]
        else:
            keys[key] = NotRequired[Optional[strict(hint)]]  # noqa: UP045
    make: Any = TypedDict
    made = make(published.__name__, keys)
    made.__pydantic_config__ = ConfigDict(strict=True, extra="allow")
    return made


def _union(members: list[Any]) -> Any:
    dictionaries = [member for member in members if is_typeddict(member)]
    others = [member for member in members if not is_typeddict(member)]
    key = _telling(dictionaries)
    if key is not None:
        told = reduce(or_, dictionaries)
        others.append(Annotated[told, Field(discriminator=key)])
    else:
        others.extend(dictionaries)
    return Union[tuple(others)]  # noqa: UP007


def _telling(dictionaries: list[Any]) -> str | None:
    """The key whose literal differs between all ``dictionaries``, if there are several."""
    for key in _KEYS:
        hints = [get_type_hints(member).get(key) for member in dictionaries]
        values = [get_args(hint) for hint in hints if get_origin(hint) is Literal]
        every = [value for each in values for value in each]
        if len(values) == len(hints) > 1 and len(set(every)) == len(every):
            return key
    return None


def without_nulls(value: Any) -> Any:
    """A checked value without the keys that are null, which stand for absent ones."""
    if isinstance(value, dict):
        return {key: without_nulls(found) for key, found in value.items() if found is not None}
    if isinstance(value, list):
        return [without_nulls(found) for found in value]
    return value
