"""Damaged safetensors files and indexes are refused before data is read, or change no logits."""

import json
import random
import struct
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from tests.adversarial.harness import Wrong
from tests.adversarial.kinds import _json, _model

from glm_fused.checkpoint import folder as folder_module
from glm_fused.checkpoint import safetensors_header as reader
from glm_fused.loader import load_model

NAME = "header"
SLOW_CASES = 15_000
QUICK_CASES = 100
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def prepare(folder):
    """Make good checkpoints of one file and of several."""
    _model.write(folder / "single")
    _model.write(folder / "sharded", shards=3)


def drop_tensor(rng, header, name):
    del header[name]


def rename_tensor(rng, header, name):
    cut = rng.randrange(len(name))
    header[name[:cut] + rng.choice("xü\0./") + name[cut:]] = header.pop(name)


def change_dtype(rng, header, name):
    dtypes = ["I8", "BF16", "F64", "U64", "Q4_K", "", "bf16", None, 4, []]
    header[name]["dtype"] = rng.choice([d for d in dtypes if d != header[name]["dtype"]])


def change_shape(rng, header, name):
    shape = header[name]["shape"]
    position = rng.randrange(len(shape))
    values = [0, -1, shape[position] + 1, 2**40, 2**80, 1.5, "8", None, [8], True]
    if shape[position] == 1:
        values.remove(True)  # equal to 1 in Python, but no number in JSON
    shape[position] = rng.choice(values)


def change_rank(rng, header, name):
    shape = header[name]["shape"]
    new = [shape[::-1], [*shape, 1], [1, *shape], [], None, {}, "8", [1] * 99 + shape]
    header[name]["shape"] = rng.choice([s for s in new if s != shape])


def change_offsets(rng, header, name):
    begin, end = header[name]["data_offsets"]
    values = [
        [begin + 2, end + 2],
        [begin - 2, end - 2],
        [begin, end - 2],
        [end, begin],
        [begin, 2**63],
        [-(2**70), end],
        [begin],
        [begin, end, end],
        [float(begin), end],
        None,
        "0,8",
    ]
    header[name]["data_offsets"] = rng.choice(values)


def change_entry(rng, header, name):
    header[name] = rng.choice([None, [], 7, {}, "x", header[name] | {"extra": 1}, [header[name]]])


def repeat_tensor(rng, header, name):
    header[f"{name}.copy"] = dict(header[name])


def swap_tensors(rng, header, name):
    others = [
        n for n in header if n != "__metadata__" and header[n]["shape"] != header[name]["shape"]
    ]
    other = rng.choice(others)
    header[name], header[other] = header[other], header[name]


def change_metadata(rng, header, name):
    header["__metadata__"] = rng.choice([7, [], {"a": 1}, {"a": None}, "x"])


HEADER_MUTATIONS = [
    drop_tensor,
    rename_tensor,
    change_dtype,
    change_shape,
    change_rank,
    change_offsets,
    change_entry,
    repeat_tensor,
    swap_tensors,
    change_metadata,
]


def corrupt(rng, content):
    """Truncate or extend the file, or damage the JSON of its header."""
    size = 8 + struct.unpack("<Q", content[:8])[0]
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content + bytes(rng.randrange(1, 100))
    if kind == 2:
        length = rng.choice([0, 1, size - 9, size - 7, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:]
    position = rng.randrange(8, size // 2)
    if kind == 3:
        byte = rng.choice([0, 0x80, 0xFF])  # JSON takes none of these for a space
        return content[:position] + bytes([byte]) + content[position + 1 :]
    return content[:position] + content[position + 1 :]


def damaged_header(rng, content):
    """The file's bytes, and whether they must be refused."""
    header, data = _model.header_of(content)
    if rng.random() < 0.5:
        name = rng.choice([n for n in header if n != "__metadata__"])
        rng.choice(HEADER_MUTATIONS)(rng, header, name)
        text, must_fail = json.dumps(header), True
    else:
        text, must_fail = _json.damaged(rng, header)[0], False
    text = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data, must_fail


def damage(rng, folder):
    """A damaged copy, and whether it must be refused."""
    kind = rng.randrange(3)
    if kind == 2:
        good = folder / "sharded"
        bad = _model.clone(good, folder / "bad", INDEX)
        index = json.loads((good / INDEX).read_text())
        (bad / INDEX).write_text(_json.damaged(rng, index)[0], errors="surrogatepass")
        return bad, False
    good = folder / "single"
    bad = _model.clone(good, folder / "bad", SINGLE)
    content = (good / SINGLE).read_bytes()
    changed, must_fail = damaged_header(rng, content) if kind else (corrupt(rng, content), True)
    (bad / SINGLE).write_bytes(changed)
    return bad, must_fail and changed != content


def case(seed, folder):
    """Load one damaged checkpoint."""
    bad, must_fail = damage(random.Random(seed), folder)
    before = mx.get_active_memory()
    try:
        load_model(bad, lazy=True)
    except (ValueError, OSError):
        if mx.get_active_memory() - before > 1 << 20:
            raise Wrong("data was read before it was refused") from None
        raise
    if must_fail:
        raise Wrong("accepted")
    if _model.both_paths(bad)[0] != _model.expected(folder / "single"):
        raise Wrong("other logits")
    return "right"


@contextmanager
def planted():
    """Nobody compares where tensors lie."""
    with (
        mock.patch.object(reader, "_check_extents", lambda *args: None),
        mock.patch.object(folder_module, "read_header", reader.read_header),
    ):
        yield
