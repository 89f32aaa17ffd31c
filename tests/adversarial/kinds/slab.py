"""Layer files of sidecars have flipped, moved, missing or foreign bytes."""

import random
from contextlib import contextmanager
from unittest import mock

from conftest import write_checkpoint
from tests.adversarial.kinds._sidecars import LAYERS, Sidecars
from tests.adversarial.kinds._streamed import CONFIG, EXPERTS

from glm_fused import _ext
from glm_fused.streaming import sidecar_identity
from glm_fused.streaming.pack import pack
from glm_fused.streaming.sidecar import PAGE

NAME = "slab"
QUICK_CASES = 60
SLOW_CASES = 2000
_state = {}


def prepare(folder):
    """Make a sound sidecar, and that of another checkpoint."""
    sidecars = _state["sidecars"] = Sidecars(folder)
    other = folder / "other"
    write_checkpoint(other, CONFIG, quantization={"group_size": 32, "bits": 4}, shards=2, seed=1)
    pack(other, other / "sidecar")
    _state["other"] = {name: (other / "sidecar" / name).read_bytes() for name in LAYERS}
    _state["slab"] = (len(sidecars.bytes[LAYERS[0]]) - PAGE) // EXPERTS


def flip(rng, data):
    for _ in range(rng.choice([1, 1, 1, 3, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_header(rng, data):
    data[rng.randrange(PAGE if rng.random() < 0.3 else 120)] ^= 1 << rng.randrange(8)


def resize(rng, data):
    if rng.random() < 0.5:
        del data[rng.choice([0, 1, PAGE - 1, PAGE, len(data) - 1, rng.randrange(len(data))]) :]
    else:
        data += bytes(rng.choice([1, 511, 4096, PAGE, _state["slab"]]))


def shift(rng, data):
    """Insert bytes at one place and cut the end, so that all that follows comes late."""
    at = rng.randrange(len(data))
    data[at:at] = bytes(rng.randrange(1, 100))
    del data[len(_state["sidecars"].bytes[LAYERS[0]]) :]


def swap_experts(rng, data):
    a, b = (PAGE + e * _state["slab"] for e in rng.sample(range(EXPERTS), 2))
    size = _state["slab"]
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def copy_range(rng, data):
    size = rng.choice([1, 64, 512, 4096, PAGE])
    a, b = rng.randrange(len(data) - size), rng.randrange(len(data) - size)
    data[a : a + size] = data[b : b + size]


def hole(rng, data):
    size = rng.choice([512, 4096, 65536])
    at = rng.randrange(0, len(data), 512)
    data[at : at + size] = bytes(len(data[at : at + size]))


def foreign_expert(rng, data):
    """Put in an expert of another checkpoint, under this one's header."""
    at = PAGE + rng.randrange(EXPERTS) * _state["slab"]
    data[at : at + _state["slab"]] = _state["other"][LAYERS[0]][at : at + _state["slab"]]


CHANGES = (flip, flip, flip_header, resize, shift, swap_experts, copy_range, hole, foreign_expert)


def mutate(rng):
    """The layer files that differ from the sound ones."""
    sound = _state["sidecars"].bytes
    name = rng.choice(LAYERS)
    kind = rng.randrange(10)
    if kind == 0:
        return {name: None}
    if kind == 1:
        return {LAYERS[0]: sound[LAYERS[1]], LAYERS[1]: sound[LAYERS[0]]}
    if kind == 2:
        return {name: _state["other"][name]}
    if kind == 3:
        return {name: b""}
    data = bytearray(sound[name])
    rng.choice(CHANGES)(rng, data)
    return {name: bytes(data)}


def case(seed, folder):
    """Load with a mutated file, verify it, and sometimes pack over it."""
    rng = random.Random(seed)
    sidecars = _state["sidecars"]
    changed = mutate(rng)
    sidecars.lay_out(**changed)
    differs = any(sidecars.bytes[name] != data for name, data in changed.items())
    outcome = sidecars.outcome(rng, noticed=differs)
    if rng.random() < 0.1:
        sidecars.mend()
    return outcome


@contextmanager
def planted():
    """Nobody compares a checksum or a block."""
    bank = _ext.slot_bank

    def credulous(*args):
        return bank(*args[:5], [], *args[6:])

    with (
        mock.patch.object(_ext, "slot_bank", credulous),
        mock.patch.object(sidecar_identity, "check_sample", lambda *_: None),
    ):
        yield
