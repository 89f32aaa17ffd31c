"""Manifests of sidecars in which any node of the JSON, or any byte, is something else."""

import copy
import json
import random
from contextlib import contextmanager
from unittest import mock

from tests.adversarial.kinds._sidecars import Sidecars

from glm_fused.streaming import sidecar_identity

NAME = "manifest"
QUICK_CASES = 60
SLOW_CASES = 3000
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2.5,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**64,
    10**400,
    "",
    "x",
    "-1",
    "0" * 16,
    "f" * 17,
    "\ud800",
    "a" * 100_000,
    [],
    [[]],
    {},
    {"a": 1},
    "../layer_001.bin",
)
_state = {}


def prepare(folder):
    """Make a sound sidecar, and keep its manifest."""
    _state["sidecars"] = Sidecars(folder)
    _state["manifest"] = json.loads(_state["sidecars"].bytes["manifest.json"])


def places(node):
    """Yield every container and key of a document."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def other(rng, value):
    """Something to stand in the place of a value: of another type, or near it."""
    if type(value) is int and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value)])
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        near = [value[:at], value[:at] + rng.choice("0f-xG ") + value[at + 1 :], value.upper()]
        return rng.choice([*near, value + "0", value[::-1], f"{value}\n", f" {value}"])
    if isinstance(value, list) and rng.random() < 0.5:
        return rng.choice([value[::-1], value[1:], value[:-1], value * 2, [*value, 1], [value]])
    return copy.deepcopy(rng.choice(VALUES))


def change(rng, document):
    container, key = rng.choice(list(places(document)))
    container[key] = other(rng, container[key])


def delete(rng, document):
    container, key = rng.choice(list(places(document)))
    del container[key]


def insert(rng, document):
    container, key = rng.choice(list(places(document)))
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(rng.choice([container[key], *VALUES])))
    else:
        container[rng.choice(["x", "", "layers ", "Set"])] = copy.deepcopy(container[key])


def swap(rng, document):
    """Swap two values of one container, or of two layers."""
    containers = [c for c, _ in places(document) if len(c) > 1]
    container = rng.choice(containers)
    a, b = rng.sample(list(container), 2) if isinstance(container, dict) else (0, -1)
    if isinstance(container, list):
        a, b = rng.sample(range(len(container)), 2)
    container[a], container[b] = container[b], container[a]


def swap_layers(rng, document):
    a, b = document["layers"]
    key = rng.choice(list(a))
    a[key], b[key] = b[key], a[key]


def mistake(rng, document):
    """Describe parts that are not the checkpoint's but have its bytes, alike in every layer."""
    old = [part[0] for part in document["layers"][0]["parts"]]
    a, b = rng.sample(range(len(old)), 2)
    kind = rng.choice(["gate, up", "scales, biases", "any", "types", "order", "shape"])
    for layer in document["layers"]:
        parts = layer["parts"]
        if kind == "order":
            parts[a], parts[b] = parts[b], parts[a]
        elif kind == "types":
            parts[a][1] = {"BF16": "F16", "U32": "F32"}.get(parts[a][1], "U8")
        elif kind == "shape":
            parts[a][2] = parts[a][2][::-1]
        else:
            pair = {
                "gate, up": ("gate_proj.weight", "up_proj.weight"),
                "scales, biases": ("up_proj.scales", "up_proj.biases"),
            }.get(kind, (old[a], old[b]))
            for part in parts:
                part[0] = {pair[0]: pair[1], pair[1]: pair[0]}.get(part[0], part[0])


def as_text(rng, text):
    """The bytes of the file with some damage."""
    data = bytearray(text)
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at] = rng.choice([b"\0", b"\xff", b"{", b"]", b'"', b"," * 9, b"[" * 100_000])
    else:
        end = min(len(data), at + rng.randrange(1, 200))
        data[at:at] = data[at:end]
    return bytes(data)


def mutate(rng):
    """The bytes of a manifest, and whether it says something else than the sound one."""
    sound = _state["manifest"]
    if rng.random() < 0.2:
        text = as_text(rng, _state["sidecars"].bytes["manifest.json"])
    else:
        document = copy.deepcopy(sound)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            how = rng.choice([change, change, delete, insert, swap, swap_layers, mistake, mistake])
            try:
                how(rng, document)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                break  # an earlier mutation left no such place
        text = json.dumps(document).encode()
    try:
        differs = json.dumps(json.loads(text), sort_keys=True) != json.dumps(sound, sort_keys=True)
    except (ValueError, RecursionError):
        differs = True
    return text, differs


def case(seed, folder):
    """Load with a mutated manifest, verify it, and sometimes pack over it."""
    rng = random.Random(seed)
    sidecars = _state["sidecars"]
    text, differs = mutate(rng)
    sidecars.lay_out(**{"manifest.json": text})
    outcome = sidecars.outcome(rng, noticed=differs)
    if rng.random() < 0.1:
        sidecars.mend()
    return outcome


@contextmanager
def planted():
    """Nobody compares the manifest with the checkpoint."""
    with mock.patch.object(sidecar_identity, "_check_layers", lambda *_: None):
        yield
