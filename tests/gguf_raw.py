"""The parts of a GGUF file, to be changed one by one; it reads good files alone."""

import struct
from dataclasses import dataclass

ALIGNMENT = 32
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


@dataclass
class Entry:
    """A key with the type and the bytes of its value."""

    key: bytes
    kind: int
    value: bytes


@dataclass
class Tensor:
    """A tensor's entry; ``sizes`` begin with the columns of a row."""

    name: bytes
    sizes: list
    kind: int
    offset: int


@dataclass
class Raw:
    """A file; counts are those of the lists unless they are given."""

    entries: list
    tensors: list
    data: bytes
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    tensor_count: int | None = None
    entry_count: int | None = None

    def header(self):
        """The bytes before the padding that precedes the data."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        entries = len(self.entries) if self.entry_count is None else self.entry_count
        parts = [self.magic, self.version, struct.pack("<QQ", tensors, entries)]
        for entry in self.entries:
            parts += [text(entry.key), struct.pack("<I", entry.kind), entry.value]
        for t in self.tensors:
            parts += [text(t.name), struct.pack(f"<I{len(t.sizes)}Q", len(t.sizes), *t.sizes)]
            parts.append(struct.pack("<IQ", t.kind, t.offset))
        return b"".join(parts)

    def bytes(self):
        """The file."""
        header = self.header()
        return header + bytes(-len(header) % ALIGNMENT) + self.data

    def entry(self, key):
        """The entry of a key."""
        return next(entry for entry in self.entries if entry.key == key.encode())


def text(value):
    """A string as the format has it."""
    return struct.pack("<Q", len(value)) + value


def parse(content):
    """The parts of a good file."""
    at = 8

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", content, at)
        at += struct.calcsize(f"<{code}")
        return value

    def take_text():
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at]

    def skip(kind):
        if kind == STRING:
            take_text()
        elif kind == ARRAY:
            kind = take("I")
            for _ in range(take("Q")):
                skip(kind)
        else:
            take(CODES[kind])

    tensor_count, entries, tensors = take("Q"), [], []
    for _ in range(take("Q")):
        key, kind, begin = take_text(), take("I"), at
        skip(kind)
        entries.append(Entry(key, kind, content[begin:at]))
    for _ in range(tensor_count):
        name, rank = take_text(), take("I")
        sizes = [take("Q") for _ in range(rank)]
        tensors.append(Tensor(name, sizes, take("I"), take("Q")))
    return Raw(entries, tensors, content[-(-at // ALIGNMENT) * ALIGNMENT :])
