"""Prompt caches, in files and in memory, have other layers, lengths, types and shapes.

Nobody can check what is in the rows, so no case changes that alone.
"""

import copy
import json
import random
import struct
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from conftest import write_checkpoint
from mlx_lm.models import cache as stock
from mlx_lm.models.cache import CacheList, KVCache, save_prompt_cache, trim_prompt_cache
from tests.adversarial.harness import Wrong
from tests.adversarial.kinds._streamed import CONFIG

from glm_fused.checkpoint.prompt_cache import load_prompt_cache
from glm_fused.loader import load_model
from glm_fused.models import cache_check
from glm_fused.models import decoder as model_module

NAME = "prompt_cache"
QUICK_CASES = 60
SLOW_CASES = 10_000
LENGTH = 9
FORMATS = ("auto", "fp8", "int8", "fp32")
DTYPES = (mx.bfloat16, mx.float16, mx.float32, mx.uint8, mx.int8, mx.int32, mx.bool_)
TOKENS, NEXT = [7, 3, 90, 14, 55, 6, 201, 33, 8], mx.array([[5]])
NUMBERS = (0, 1, -1, 4, 2.5, True, None, "9", 255, 256, 257, 2**31, 2**63, 10**30)
_state = {}


def prepare(folder):
    """Make caches of every format in files, and keep what the model says after each prefix."""
    write_checkpoint(folder / "model", CONFIG)
    model, _ = load_model(folder / "model")
    _state["model"] = model
    for kv_format in FORMATS:
        model.kv_format = kv_format
        kv = model.make_cache()
        mx.eval(model(mx.array([TOKENS]), kv))
        file = folder / f"{kv_format}.safetensors"
        save_prompt_cache(str(file), kv)
        _state[kv_format] = file.read_bytes()
        for length in range(LENGTH, -1, -1):
            trim_prompt_cache(kv, kv[0].size() - length)
            _state[kv_format, length] = mx.stop_gradient(model(NEXT, copy.deepcopy(kv)))
            mx.eval(_state[kv_format, length])
    model.kv_format = "auto"


def parse(data):
    """The header and data of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def change_tensor(rng, header):
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    key = rng.choice(list(entry))
    if key == "dtype":
        entry[key] = rng.choice(["BF16", "F16", "F32", "I32", "U8", "I8", "F64", "C64", "", None])
    else:
        at = rng.randrange(len(entry[key])) if entry[key] else 0
        whole = rng.choice([[], None, "x", entry[key][::-1], [*entry[key], 1], [1]])
        changed = [*entry[key][:at], rng.choice(NUMBERS), *entry[key][at + 1 :]]
        entry[key] = rng.choice([whole, changed, changed])


def change_length(rng, header, data):
    """Change a scalar of the state, which is a tensor of 0 dimensions."""
    scalars = [n for n, e in header.items() if n != "__metadata__" and e["shape"] == []]
    begin, end = header[rng.choice(scalars)]["data_offsets"]
    value = rng.choice([0, 1, LENGTH - 1, LENGTH + 1, 256, 257, 2**31 - 1, -1, -LENGTH])
    data[begin:end] = (value % 256 ** (end - begin)).to_bytes(end - begin, "little")


def drop_or_rename(rng, header):
    name = rng.choice(list(header))
    entry = header.pop(name)
    if rng.random() < 0.5:
        at = rng.randrange(len(name))
        header[name[:at] + rng.choice(["0", "9", "x", "", ".", "1."]) + name[at + 1 :]] = entry


def change_metadata(rng, header):
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    kind = rng.randrange(3)
    if kind == 0:
        del metadata[key]
    elif kind == 1:
        metadata[key + rng.choice(["x", ".0", "1"])] = metadata.pop(key)
    else:
        classes = ["KVCache", "RotatingKVCache", "mx", "CacheList", "", "scalar", "none", "string"]
        metadata[key] = rng.choice([*classes, "9.9", 7, None])


def through_a_file(rng, folder, kv_format):
    """A cache from a file with a fault."""
    header, data = parse(_state[kv_format])
    data = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        change_length(rng, header, data)
    else:
        [change_tensor, drop_or_rename, change_metadata, change_tensor][kind - 1](rng, header)
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + data
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content))]
    file = folder / "case.safetensors"
    file.write_bytes(content)
    return load_prompt_cache(file, _state["model"].args)


def reshape(rng, array):
    """The array in another shape or type."""
    axis = rng.randrange(4)
    kind = rng.randrange(6)
    if kind == 0:
        return array.astype(rng.choice([d for d in DTYPES if d != array.dtype]))
    if kind == 1:
        return mx.concatenate([array, array], axis=axis)  # rows that are used stay where they are
    if kind == 2:
        return mx.take(array, mx.arange(max(array.shape[axis] - 1, 0)), axis=axis)
    if kind == 3:
        return array.swapaxes(*rng.sample(range(4), 2))
    if kind == 4:
        return array.squeeze(0)
    return rng.choice([None, array.tolist(), 5, mx.array(3), mx.zeros((0, 1, 0, 4))])


def change_entry(rng, entry):
    kind = rng.randrange(6)
    if kind == 0:
        entry.offset = rng.choice([n for n in NUMBERS if n != entry.offset])
    elif kind == 1:
        entry.trim(rng.randrange(1, LENGTH + 1))
    elif kind in (2, 3):
        name = rng.choice(["keys", "values"])
        setattr(entry, name, reshape(rng, getattr(entry, name)))
    elif kind == 4:
        entry.keys, entry.values = (reshape(rng, a) for a in (entry.keys, entry.values))
    else:
        entry.keys, entry.values = entry.values, entry.keys


def change_layers(rng, kv):
    kinds = [KVCache(), stock.RotatingKVCache(8), stock.QuantizedKVCache(), stock.ArraysCache(2)]
    kinds += [stock.ConcatenateKVCache(), stock.BatchKVCache([0]), None, 3, "x"]
    i = rng.randrange(len(kv))
    kind = rng.randrange(6)
    if kind == 0:
        del kv[i]
    elif kind == 1:
        kv.insert(i, copy.deepcopy(rng.choice(kv)))
    elif kind == 2:
        kv[i] = rng.choice(kinds)
    elif kind == 3:
        kv[i].caches = [*kv[i].caches, rng.choice(kinds)]
    elif kind == 4:
        kv[i].caches = list(kv[i].caches)[:-1]
    else:
        caches = list(kv[i].caches)
        caches[rng.randrange(len(caches))] = rng.choice(kinds)
        kv[i].caches = caches


def in_memory(rng, folder, kv_format):
    """A sound cache to which something is done, perhaps between two steps of its use."""
    file = folder / "sound.safetensors"
    file.write_bytes(_state[kv_format])
    kv = load_prompt_cache(file, _state["model"].args)
    if rng.random() < 0.5:
        mx.eval(_state["model"](NEXT, kv))
        trim_prompt_cache(kv, 1)
    if rng.random() < 0.15:  # sound
        trim_prompt_cache(kv, rng.randrange(LENGTH))
    elif rng.random() < 0.25:
        change_layers(rng, kv)
    else:
        change_entry(rng, rng.choice([c for layer in kv for c in layer.caches]))
    return kv


def case(seed, folder):
    """Ask for a token after a cache with a fault: it is right for the prefix held, or an error."""
    rng = random.Random(seed)
    kv_format = rng.choice(FORMATS)
    kv = rng.choice([through_a_file, in_memory])(rng, folder, kv_format)
    logits = _state["model"](NEXT, kv)
    sizes = {c.size() for layer in kv for c in layer.caches}
    if len(sizes) != 1 or type(kv[0]) is not CacheList:
        raise Wrong(f"layers of {sizes} tokens were taken")
    expected = _state.get((kv_format, sizes.pop() - 1))
    if expected is None or not mx.array_equal(logits, expected):
        raise Wrong(f"other logits, {kv_format}, {kv[0].size() - 1} tokens of {LENGTH}")
    return "right"


@contextmanager
def planted():
    """Nobody checks a cache."""
    with (
        mock.patch.object(model_module, "check_cache", lambda *_: None),
        mock.patch.object(cache_check, "check_cache", lambda *_: None),
    ):
        yield
