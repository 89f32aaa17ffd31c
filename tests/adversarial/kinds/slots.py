"""A bank of slots driven directly: random requests, policies, leases; every byte is compared."""

import random
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np
from tests.adversarial.harness import Wrong

from glm_fused import _ext

NAME = "slots"
EXPERTS, BYTES = 16, (4096, 100)
SLOW_CASES = 10_000


def prepare(folder):
    """Every byte of an expert is its number."""
    contents = (bytes([e]) * sum(BYTES) for e in range(EXPERTS))
    (folder / "experts.bin").write_bytes(b"".join(contents))


def make_bank(rng, file):
    """A bank of random size and policy, and the most experts of a request."""
    files = _ext.SlotFiles([str(file)], [file.stat().st_size], rng.random() < 0.3)
    locations = [(0, e * sum(BYTES) + at) for e in range(EXPERTS) for at in (0, BYTES[0])]
    parts = [([size], mx.uint8) for size in BYTES]
    policy = rng.choice(["learned", "lru", "s3fifo", "pinned"])
    slots = rng.randrange(4, EXPERTS + 1)
    reader = _ext.SlotReader(rng.randrange(1, 5), 4096)
    return _ext.slot_bank(reader, files, 7, parts, locations, [], slots, 0, policy, [3], 5.0)


def check(bank, slots, experts):
    """The slots hold the experts."""
    for array in bank.arrays:
        content = np.array(array)[slots]
        if not (content == np.array(experts)[:, None]).all():
            raise Wrong(f"slots {slots} do not hold experts {experts}")


def case(seed, folder):
    """Some requests, each checked."""
    rng = random.Random(seed)
    bank = make_bank(rng, folder / "experts.bin")
    for _ in range(rng.randrange(1, 12)):
        experts = rng.sample(range(EXPERTS), rng.randrange(1, 4))
        pending, _ = _ext.slots_resolve(bank, mx.array([experts], mx.int32))
        slots = _ext.slots_wait(bank, pending)
        mx.eval(slots)
        check(bank, slots.tolist()[0], experts)
    return "right"


@contextmanager
def planted():
    """Nobody waits for reads."""
    with mock.patch.object(_ext, "slots_wait", lambda bank, slots: slots + 0):
        yield
