"""Does small damage to JSON: a value is replaced, a key lost or doubled, a byte changed."""

import json

HUGE = [2**31, 2**32 + 1, 2**63, 2**64, -(2**63) - 1, 10**400, -(10**400)]
NUMBERS = [0, 1, -1, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")]
OTHERS = [None, True, False, "", "0", "x", "x" * 5000, "\ud800", "é", "\0", [], {}, [[]], [{}]]
RAW = ["1e400", "-1e400", "9" * 5000, "[" * 50_000, '{"a":' * 5000, "NaN", "01", "'x'", "//"]
MARK = "\0raw\0"


def places(value, path=()):
    """Yield every path in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def damaged(rng, value, within=None):
    """The text of `value` with one to three changes, and the paths that changed.

    `within` says which paths may change.
    """
    value = json.loads(json.dumps(value))
    raw, changed = "0", []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = [p for p in places(value) if p and (within is None or within(p))]
        if not paths:
            break
        path = rng.choice(paths)
        changed.append(path)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        raw = _change(rng, parent, path[-1], raw)
    text = json.dumps(value).replace(json.dumps(MARK), raw)
    return text, changed


def _change(rng, parent, key, raw):
    """Change one entry; returns the text to stand in for `MARK`."""
    kind = rng.randrange(8)
    old = parent[key]
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice([key + "x", key.upper(), "", "\0", key[:-1]])] = parent.pop(key)
    elif kind == 1:
        parent.insert(key, old)
    elif kind == 2 and type(old) in (int, float):
        parent[key] = rng.choice([old + 1, old - 1, old * 2, -old, "7", [old]])
    elif kind == 3:
        parent[key], raw = MARK, rng.choice(RAW)
    elif kind == 4 and isinstance(old, list):
        parent[key] = rng.choice([old[::-1], old[1:], old * 2, dict.fromkeys(map(str, old))])
    else:
        parent[key] = rng.choice(rng.choice([HUGE, NUMBERS, OTHERS]))
    return raw


def damaged_bytes(rng, content):
    """`content` cut, extended or with some bytes changed."""
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        return content + rng.choice([b"\0", b"x", b"{}", b"\n", b" " * 9, bytes(100)])
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        if kind == 2:
            changed[at] = rng.choice(b'\0\n\x80\xff"{}[]:,0x')
        elif kind == 3:
            del changed[at]
        else:
            changed[at:at] = bytes([rng.choice(b'\0\n\x80\xff"{}[]:,0x')])
    return bytes(changed)
