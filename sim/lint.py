"""Finds, in shader text, what the simulator's compiler accepts and Apple's would not.

Each rule is a function from an outline to (token position, message) pairs. The implicit
conversions to bfloat that Apple refuses need no rule: the simulator refuses them too."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .outline import Outline
from .tokens import SyntaxProblem

Problems = Iterator[tuple[int, str]]
_SPACES = {"device", "constant", "threadgroup", "thread", "threadgroup_imageblock", "ray_data"}
_REFUSED = {
    "goto": "goto",
    "double": "double",
    "try": "exceptions",
    "catch": "exceptions",
    "throw": "exceptions",
    "new": "new",
    "delete": "delete",
    "virtual": "virtual functions",
    "dynamic_cast": "run-time type information",
    "typeid": "run-time type information",
    "thread_local": "thread_local",
    "asm": "inline assembly",
    **dict.fromkeys(("__asm__", "__asm"), "inline assembly"),
    **dict.fromkeys(("__global", "__local", "__constant", "__private", "__generic"), "OpenCL"),
    **dict.fromkeys(("__kernel", "__read_only", "__write_only", "__read_write"), "OpenCL"),
    "_Float16": "half is its name",
    "__bf16": "bfloat is its name",
}
_NOT_TYPES = {"return", "case", "else", "using", "operator", "goto", "throw", "delete", "sizeof"}
_BYTES = {
    **dict.fromkeys(("bool", "char", "uchar", "int8_t", "uint8_t"), 1),
    **dict.fromkeys(("short", "ushort", "half", "bfloat", "float16_t", "bfloat16_t"), 2),
    **dict.fromkeys(("int", "uint", "float", "int32_t", "uint32_t"), 4),
    **dict.fromkeys(("long", "ulong", "int64_t", "uint64_t", "size_t"), 8),
}
_LIMIT = 32 * 1024


def _pointer(o: Outline, first: int, end: int, unnamed: bool = False) -> int | None:
    """The position of a `*` or `&` whose declaration names no address space; None without one."""
    s = o.stream
    i = first
    while i < end:
        text = s[i]
        if text in ("*", "&", "&&"):
            named = s[i + 1].isidentifier() or s[i + 1] in ("*", "&", "(")
            is_type = i > first and (named or unnamed) and s[first] not in _NOT_TYPES
            return i if is_type and not _SPACES & set(s.texts[first:i]) else None
        if text == "<":
            try:
                i = s.angle(i)
            except SyntaxProblem:
                return None
        elif text == "[[":
            i = s.close(i)
        elif not (text.isidentifier() or text == "::"):
            return None
        i += 1
    return None


def _after_template(o: Outline, first: int) -> int:
    s = o.stream
    while s[first] == "template" and s[first + 1] == "<":
        first = s.angle(first + 1) + 1
    return first


def unqualified_pointers(o: Outline) -> Problems:
    s = o.stream
    ranges = [(a, b, True) for parameters in o.declared for a, b in parameters]
    ranges += [(_after_template(o, a), b, False) for _, a, b in o.statements]
    # Casts are (T*)x and static_cast<T*>(x).
    for i in range(len(s)):
        if s[i] == "(" and not s[i - 1].isidentifier() and s[s.close(i) - 1] in ("*", "&"):
            ranges.append((i + 1, s.close(i), True))
        elif s[i] == "<" and s[i - 1].endswith("_cast"):
            ranges.append((i + 1, s.angle(i), True))
    for first, end, unnamed in ranges:
        at = _pointer(o, first, end, unnamed)
        if at is not None:
            kind = "pointer" if s[at] == "*" else "reference"
            yield at, f"{kind} without device, constant, threadgroup or thread"


def threadgroup_outside_kernels(o: Outline) -> Problems:
    for scope, first, end in o.statements:
        words = o.stream.texts[first:end]
        declares = "threadgroup" in words[:3] and words[0] not in ("using", "typedef", "template")
        head = words[: words.index("=")] if "=" in words else words
        if scope in ("function", "namespace") and declares and not {"*", "&"} & set(head):
            yield first, "threadgroup variable outside a kernel"


def recursion(o: Outline) -> Problems:
    """Find recursion, among functions that share name and parameter count with no other."""
    count: dict[tuple[str, int], int] = {}
    for f in o.functions:
        count[f.signature] = count.get(f.signature, 0) + 1
    functions = {f.signature: f for f in o.functions if count[f.signature] == 1}
    called = {
        key: {(name, n): at for name, n, at in o.calls(f) if (name, n) in functions}
        for key, f in functions.items()
    }
    for key, calls in called.items():
        for callee, at in calls.items():
            if _reaches(called, callee, key):
                yield (
                    at,
                    f"recursion: {key[0]} calls itself"
                    + (f" through {callee[0]}" if callee != key else ""),
                )


def _reaches(
    called: dict[tuple[str, int], dict[tuple[str, int], int]],
    start: tuple[str, int],
    goal: tuple[str, int],
) -> bool:
    seen, todo = set(), [start]
    while todo:
        key = todo.pop()
        if key == goal:
            return True
        if key not in seen:
            seen.add(key)
            todo += called[key]
    return False


def refused_words(o: Outline) -> Problems:
    s = o.stream
    for i in range(len(s)):
        text = s[i]
        if text in _REFUSED and not (text == "delete" and s[i - 1] == "="):
            yield i, f"{_REFUSED[text]}: not in Metal"
        elif text == "std" and s[i + 1] == "::":
            yield i, "std::, Metal has its own library in metal::"


def lambdas(o: Outline) -> Problems:
    s = o.stream
    for i in range(len(s)):
        value = s[i] == "[" and s[i - 1] in ("=", "(", ",", "return", "{", ";")
        if value and s[s.close(i) + 1] in ("(", "{"):
            yield i, "lambda: only Metal 4 has them"


def mutable_globals(o: Outline) -> Problems:
    s = o.stream
    skip = {"using", "typedef", "template", "struct", "class", "enum", "union", "friend"}
    for scope, first, end in o.statements:
        words = s.texts[first:end]
        # MTL_CONST and STEEL_CONST are MLX's macros for `constant`.
        if any(w == "constant" or w.endswith("_CONST") for w in words) or "static_assert" in words:
            continue
        if scope == "namespace" and words[0] not in skip | {"namespace", "extern"}:
            if sum(w.isidentifier() for w in words) > 1 and words[1] != "(":
                yield first, "global variable outside the constant address space"
        elif scope != "namespace" and "static" in words[:3]:
            yield first, "static variable outside the constant address space"


def threadgroup_size(o: Outline) -> Problems:
    """Find kernels with too much threadgroup memory, as far as sizes are known constants."""
    values = _constants(o)
    for f in o.functions:
        sizes = [
            _bytes(o, first, end, values)
            for _, first, end in o.statements
            if f.kernel and f.body[0] <= first < f.body[1]
        ]
        if sum(sizes) > _LIMIT:
            yield (
                f.body[0] - 1,
                f"kernel {f.name}: {sum(sizes)} bytes of threadgroup memory, over 32768",
            )


def _constants(o: Outline) -> dict[str, int]:
    values: dict[str, int] = {}
    for _, first, end in o.statements:
        words = o.stream.texts[first:end]
        if "constexpr" in words and "=" in words:
            at = words.index("=")
            value = _number(" ".join(words[at + 1 :]), values)
            if value is not None:
                values[words[at - 1]] = value
    return values


def _bytes(o: Outline, first: int, end: int, values: dict[str, int]) -> int:
    """The bytes that `threadgroup T x[a][b], y[c]` declares; 0 where they are not known."""
    words = o.stream.texts[first:end]
    if words[0] != "threadgroup" or {"*", "&", "="} & set(words[:3]):
        return 0
    element = _BYTES.get(words[1], 0) or 4 * _vector(words[1])
    total = 0
    for piece in o.stream.split(first, end):
        size = element
        for count in re.findall(r"\[ (.*?) \]", o.stream.text(*piece)):
            size *= _number(count, values) or 0
        total += size
    return total


def _vector(name: str) -> int:
    match = re.fullmatch(r"u?(?:int|float)([234])", name)
    return {"2": 2, "3": 4, "4": 4}[match[1]] if match else 0


def _number(text: str, values: dict[str, int]) -> int | None:
    known = re.sub(r"[A-Za-z_]\w*", lambda m: str(values.get(m[0], "?")), text)
    if not re.fullmatch(r"[\d+*/() -]+", known):
        return None
    try:
        return int(eval(compile(ast.parse(known, mode="eval"), "", "eval"), {}))
    except (SyntaxError, ZeroDivisionError):
        return None


RULES: tuple[Callable[[Outline], Problems], ...] = (
    unqualified_pointers,
    threadgroup_outside_kernels,
    recursion,
    refused_words,
    lambdas,
    mutable_globals,
    threadgroup_size,
)


def check_text(text: str, file: str = "source.metal") -> list[str]:
    """The problems of shader text as `file:line: message`, in order of line."""
    try:
        outline = Outline.of(text, file)
    except SyntaxProblem as problem:
        return [str(problem)]
    found = {
        (outline.stream.token(i).line, message) for rule in RULES for i, message in rule(outline)
    }
    return [f"{file}:{line}: {message}" for line, message in sorted(found)]


def check(path: Path) -> list[str]:
    """The problems of a shader file; see check_text."""
    return check_text(path.read_text(), str(path))
