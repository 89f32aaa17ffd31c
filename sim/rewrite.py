"""Rewrites Metal constructs that clang's C++ for OpenCL lacks; finds kernels and constants."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from .kernels import POSITIONS, Argument, EntryPoint, FunctionConstant
from .tokens import SyntaxProblem, TokenStream

_MOST_THREADS = "max_total_threads_per_threadgroup"
# What is rewritten starts with one of these.
_REWRITTEN = {"[[", "template", "kernel", "__local", "?", "const", "__private"}
_SPACES = {"__global": "device", "__local": "threadgroup", "__constant": "constant"}
_CONSTANT_TYPES = {
    **{t: t for t in ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong")},
    **{f"{sign}int{n}_t": f"{sign}int{n}_t" for sign in ("", "u") for n in (8, 16, 32, 64)},
    "float": "float",
    "half": "half",
}


@dataclass
class Rewritten:
    text: str
    entries: list[EntryPoint]
    constants: list[FunctionConstant]


@dataclass
class _Function:
    arguments: tuple[Argument, ...]
    passed: tuple[str, ...]
    limited: bool  # by max_total_threads_per_threadgroup


@dataclass
class _Rewriter:
    """One pass over the tokens of a translation unit."""

    stream: TokenStream
    functions: dict[str, _Function] = field(default_factory=dict)
    instances: list[tuple[str, str, str]] = field(default_factory=list)
    constants: list[FunctionConstant] = field(default_factory=list)
    variables: int = 0
    header: tuple[int, int] = (0, 0)  # of the last template

    def run(self) -> Rewritten:
        s = self.stream
        self.classes = {b for a, b in pairwise(s.texts) if a in ("struct", "class")}
        i = 0
        while i < len(s):
            i = self.step(i) if s.texts[i] in _REWRITTEN and s.token(i).own else i + 1
        entries = [
            EntryPoint(host, expression, f.arguments, f.passed, _limit(name, expression, f.limited))
            for host, name, expression in self.instances
            if (f := self.function(host, name))
        ]
        return Rewritten(s.edited(), entries, self.constants)

    def function(self, host: str, name: str) -> _Function:
        if name not in self.functions:
            raise SyntaxProblem(f"kernel {host!r} instantiates {name!r}, which is no kernel")
        return self.functions[name]

    def step(self, i: int) -> int:
        """Rewrite what starts at i; returns the position to go on at."""
        s = self.stream
        word = s[i]
        if word == "[[" and s[i + 1] == "function_constant" and s[s.close(i) + 1] == ";":
            return self.function_constant(i)
        if word == "template" and s[i + 1] == "[[":
            return self.instantiation(i)
        if word == "template" and s[i + 1] == "<":
            self.header = (i, s.angle(i + 1) + 1)
        if word == "[[":
            attributes = {s[a]: s.text(a + 2, b - 1) for a, b in s.split(i + 1, s.close(i) - 1)}
            if "kernel" in attributes:
                s.replace(i, s.close(i) + 1, "")
                return self.kernel(i, s.close(i) + 1, attributes.get(_MOST_THREADS, ""))
            if "host_name" in attributes:
                s.replace(i, s.close(i) + 1, "")
                return s.close(i) + 1
        if word == "kernel":
            s.replace(i, i + 1, "")
            return self.kernel(i, i + 1)
        if word == "__local" and s[i - 1] in ("{", "}", ";", ")", ":"):
            return self.threadgroup_variable(i)
        if word == "?":
            self.conditional(i)
        if word == "const" and s[i + 1] == "__constant" and self.qualifies_method(i):
            s.replace(i, i + 1, "")
        if word == "__private" and self.qualifies_constructor(i):
            s.replace(i, i + 1, "")
        return i + 1

    def qualifies_method(self, i: int) -> bool:
        """Whether a `constant` at i qualifies a method.

        Its `const` goes, because the method may be a constructor, which may not be const."""
        s = self.stream
        return s[i - 1] == ")" or (s[i - 1] == "const" and s[i - 2] == ")")

    def qualifies_constructor(self, i: int) -> bool:
        """Whether a `thread` at i qualifies a constructor, which has to go.

        With it clang takes a braced temporary for one outside `thread`."""
        s = self.stream
        if s[i - 1] != ")" or s[i + 1] not in (":", "{", ";", "="):
            return False
        return s[s.close(i - 1) - 1] in self.classes

    def conditional(self, i: int) -> None:
        """Make values of both results of the `?:` at i, whose address spaces may differ."""
        s = self.stream
        colon = s.operand_end(i + 1)
        end = s.operand_end(colon + 1)
        s.insert(i + 1, "msl_operand(")
        s.insert(colon, ") ")
        s.insert(colon + 1, "msl_operand(")
        s.insert(end, ") ")

    def function_constant(self, i: int) -> int:
        s = self.stream
        start = i - 1
        while s[start - 1] not in (";", "}", "{", ">", "") and s.token(start - 1).own:
            start -= 1
        name, index = s[i - 1], int(s[i + 3])
        words = [w for w in s.texts[start : i - 1] if w not in ("static", "const", "__constant")]
        if len(words) != 1 or words[0] not in _CONSTANT_TYPES:
            raise SyntaxProblem(f"function constant {name}: type {' '.join(words)!r} not supported")
        self.constants.append(FunctionConstant(name, words[0], index))
        symbol = f'__asm__("sim_constant_{index}")'
        declaration = f"extern const __constant {words[0]} {name} {symbol}"
        s.replace(start, s.close(i) + 1, declaration)
        return s.close(i) + 1

    def instantiation(self, i: int) -> int:
        """Take note of a kernel's instantiation at i and remove it.

        It is `template [[host_name("x")]] [[kernel]] decltype(f<…>) f<…>;` or `… void f<…>(…);`."""
        s = self.stream
        host, at = "", i + 1
        while s[at] == "[[":
            if s[at + 1] == "host_name":
                literals = s.texts[at + 3 : s.close(at) - 2]
                host = "".join(t[1:-1] for t in literals)
            at = s.close(at) + 1
        end = at
        while s[end] != ";":
            end = s.close(end) + 1 if s[end] in ("(", "[", "{", "[[") else end + 1
        at += s[at] == "kernel"
        start, stop = (at + 2, s.close(at + 1)) if s[at] == "decltype" else (at + 1, 0)
        opening = start
        while s[opening] not in ("<", "(", ";"):
            opening += 1
        if s[opening] == "<":
            stop = s.angle(opening) + 1
        self.instances.append((host, s[opening - 1], s.text(start, stop or opening)))
        s.replace(i, end + 1, ";")
        return end + 1

    def kernel(self, before: int, i: int, most_threads: str = "") -> int:
        """Rewrite a kernel's signature, which begins with its return type at i.

        `most_threads` is the value of its attribute, which becomes a constant of its own."""
        s = self.stream
        while s[i] == "[[":
            i = s.close(i) + 1
        if s[i] != "void":
            return i
        name, opening = s[i + 1], i + 2
        closing = s.close(opening)
        found = self.parameters(opening + 1, closing)
        self.functions[name] = _Function(
            tuple(a for a, _ in found), tuple(passed for _, passed in found), most_threads != ""
        )
        template = s[before - 1] == ">"
        if most_threads:
            start, end = self.header if template else (before, before)
            constant = f"constexpr __constant uint {_limit(name, name, True)} = {most_threads};"
            s.insert(start, f"{s.text(start, end)} {constant} ")
        if not template and s[closing + 1] == "{":
            self.instances.append((self.host_name(before) or name, name, name))
        return closing + 1

    def host_name(self, before: int) -> str:
        s = self.stream
        if s[before - 1] == "]" and s[s.close(before - 1) + 1] == "host_name":
            return s[s.close(before - 1) + 3][1:-1]
        return ""

    def parameters(self, start: int, stop: int) -> list[tuple[Argument, str]]:
        s = self.stream
        next_index = {"buffer": 0, "threadgroup": 0}
        found: list[tuple[Argument, str]] = []
        for a, b in s.split(start, stop):
            attributes: dict[str, str] = {}
            end = b
            for i in range(a, b):
                if s[i] == "[[":
                    for x, y in s.split(i + 1, s.close(i) - 1):
                        attributes[s[x]] = s.text(x + 2, y - 1)
                    end = min(end, i) if i > a else end
            argument, passed = self.parameter(a, end, attributes, next_index)
            for other, _ in found:
                if argument.index >= 0 and other.key == argument.key:
                    place = f"{argument.kind} {argument.index}"
                    raise SyntaxProblem(f"{other.name} and {argument.name} are both {place}")
            found.append((argument, passed))
        return found

    def parameter(
        self, a: int, end: int, attributes: dict[str, str], next_index: dict[str, int]
    ) -> tuple[Argument, str]:
        s = self.stream
        words = s.texts[a:end]
        name, text = words[-1], " ".join(words[:-1])
        position = next((x for x in attributes if x in POSITIONS), None)
        if position:
            return Argument("position", -1, name, text), POSITIONS[position]
        space = next((_SPACES[w] for w in words if w in _SPACES), "")
        kind = "threadgroup" if space == "threadgroup" else "buffer"
        index = int(attributes[kind]) if kind in attributes else next_index[kind]
        next_index[kind] = index + 1
        if index > 30:
            raise SyntaxProblem(f"kernel parameter {name}: {kind} {index}, Metal has 0 to 30")
        if not space:
            raise SyntaxProblem(f"kernel parameter {text} {name}: unknown attribute {attributes}")
        writable = space != "constant" and "const" not in words[:-1]
        argument = Argument(kind, index, name, text, space, writable, "&" in words)
        table = "buffers" if kind == "buffer" else "groups"
        return argument, f"msl_pointer{{{table}[{index}]}}"

    def threadgroup_variable(self, i: int) -> int:
        """Make of `threadgroup T x[N];` at i a reference into the threadgroup's memory."""
        s = self.stream
        end = i
        while s[end] != ";":
            if s[end] in ("(", "[", "{", "[["):
                end = s.close(end)
            end += 1
        pieces = s.split(i + 1, end)
        first, stop = pieces[0]
        name = next((k for k in range(first, stop) if s[k] in ("[", "[[")), stop) - 1
        head = s.texts[first:name]
        if not head or _is_pointer(head) or "=" in head:
            return i + 1
        element = " ".join(head)
        declarations = []
        for k, (a, b) in enumerate(pieces):
            at = name if k == 0 else a
            sizes = s.text(at + 1, b)
            target = f"(&{s[at]}) {sizes}" if sizes else f"& {s[at]}"
            pointer = f"(*) {sizes}" if sizes else "*"
            call = f"sim_rt_threadgroup({self.variables}, sizeof({element} {sizes}))"
            declarations.append(
                f"__local {element} {target} = *(__local {element} {pointer}){call};"
            )
            self.variables += 1
        s.replace(i, end + 1, " ".join(declarations))
        return end + 1


def _limit(name: str, expression: str, limited: bool) -> str:
    """What an instance of the kernel `name` names its limit of threads; "" if it has none."""
    return re.sub(rf"\b{name}\b", f"msl_most_threads_{name}", expression, count=1) * limited


def _is_pointer(words: list[str]) -> bool:
    outside = re.sub(r"<[^<>]*>", "", " ".join(words))
    return any(c in outside for c in "*&(")


def rewrite(preprocessed: str, headers: str) -> Rewritten:
    """Rewrite preprocessed shader text; `headers` is the directory of the simulator's headers.

    Raises SyntaxProblem where a construct is not understood."""
    return _Rewriter(TokenStream(preprocessed, headers)).run()
