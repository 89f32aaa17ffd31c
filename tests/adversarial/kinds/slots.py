"""A bank of slots driven directly, under failing reads, against a model of its policy."""

import random
import sys
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np
from policy_model import Table
from tests.adversarial.harness import Wrong
from tests.adversarial.kinds import _preload

from glm_fused import _ext

NAME = "slots"
QUICK_CASES = 80
SLOW_CASES = 40_000
# One process runs so many cases. An evaluation that fails may leave a task in MLX's count of active
# ones, which `_ext.active_tasks` shows; with more than ten MLX waits for a task that is over.
PIECE = 100
EXPERTS, BYTES = 16, (4096, 100)
FAULTS = (_preload.ERROR, _preload.END, _preload.SHORT, _preload.DELAY, _preload.WRONG_BYTE)
# These are the checksums of what `prepare` writes.
_SUMS = [_ext.checksum([bytes([e]) * BYTES[0], bytes([e]) * BYTES[1]]) for e in range(EXPERTS)]
_state = {}


def unavailable():
    """Why this kind cannot run here; "" where it can."""
    if sys.platform != "linux":
        return "LD_PRELOAD is Linux's"
    return "" if _preload.compiler() else "no C++ compiler"


def environment(folder):
    """The environment of a `preadv` that fails where it is told to."""
    return {"LD_PRELOAD": _preload.build("faulty_preadv")}


def prepare(folder):
    """Write a file of experts, in which every byte of an expert is its number."""
    _state["reads"] = _preload.Reads()
    contents = (bytes([e]) * sum(BYTES) for e in range(EXPERTS))
    (folder / "experts.bin").write_bytes(b"".join(contents))


def make_bank(rng, file, at_least=4, sums=(), **chosen):
    """A bank of random size and policy, or of those `chosen`."""
    files = _ext.SlotFiles([str(file)], [file.stat().st_size], rng.random() < 0.3)
    locations = [(0, e * sum(BYTES) + at) for e in range(EXPERTS) for at in (0, BYTES[0])]
    return _ext.slot_bank(
        _ext.SlotReader(rng.choice([1, 2, 4]), 4096),
        files,
        7,
        [([size], mx.uint8) for size in BYTES],
        locations,
        list(sums),
        chosen.get("slots", rng.randrange(at_least, EXPERTS + 1)),
        chosen.get("spares", 0),
        chosen.get("policy", rng.choice(["learned", "lru", "s3fifo", "pinned"])),
        [3],
        5.0,
    )


def check_slots(bank, slots, experts):
    """Raise `Wrong` unless the slots hold the experts."""
    for array in bank.arrays:
        content = np.array(array)[slots.tolist()[0]]
        if not (content == np.array(experts)[:, None]).all():
            raise Wrong(f"slots {slots.tolist()} do not hold experts {experts}")


def resolve(bank, experts):
    """A use of the bank, and the slots of its experts."""
    use = _ext.SlotUse(bank, _ext.SlotReads())
    pending, _ = use.resolve(mx.array([experts], mx.int32))
    return use, wait(use, pending)


def wait(use, slots):
    """The same slots, once they are read; a planted fault replaces this."""
    return use.wait(slots)


def request(bank, experts):
    """The slots of a request, once they are read and compared."""
    slots = resolve(bank, experts)[1]
    mx.eval(slots)
    check_slots(bank, slots, experts)
    return slots


def in_good_times(rng, file):
    """Without faults a bank holds what the model of its policy says."""
    policy = rng.choice(["learned", "lru", "pinned"])
    slots = rng.randrange(10, EXPERTS + 1)  # a request, two that are held, and a pinned one
    bank, table = (
        make_bank(rng, file, policy=policy, slots=slots),
        Table(policy, EXPERTS, slots, [3]),
    )
    held = {}
    for step in range(rng.randrange(1, 20)):
        experts = rng.sample(range(EXPERTS), rng.randrange(1, 4))
        table.reserve(experts, {e for of, _ in held.values() for e in of})
        got = request(bank, experts)
        if bank.resident() != sorted(table.resident):
            raise Wrong(f"{bank.resident()} are resident, expected {sorted(table.resident)}")
        held.pop(step - 2, None)
        if rng.random() < 0.2:
            held[step] = experts, got
        del got
    return "right"


def in_bad_times(rng, file):
    """Under faults a request gets its experts or an error; what is resident is whole."""
    reads = _state["reads"]
    fault, spares = rng.choice(FAULTS), rng.choice([0, 0, 2])
    sums = _SUMS if fault == _preload.WRONG_BYTE or rng.random() < 0.5 else ()
    reads.disarm()
    bank = make_bank(rng, file, at_least=5 + spares, sums=sums, spares=spares)
    reads.arm(fault, 0, 0, rng.choice([20, 100, 400]), rng.getrandbits(63))
    outcome = "right"
    for _ in range(rng.randrange(1, 15)):
        experts = rng.sample(range(EXPERTS), rng.randrange(1, 4))
        try:
            if spares and rng.random() < 0.4:
                ahead = mx.array([rng.sample(range(EXPERTS), 3)], mx.int32)
                mx.eval(_ext.slots_prefetch(bank, ahead, mx.zeros(1)))
            before = reads.hits
            request(bank, experts)
        except RuntimeError as error:
            if fault in (_preload.SHORT, _preload.DELAY) or reads.hits == 0:
                raise Wrong(f"fault {fault}, {reads.hits} hits: {error}") from None
            outcome = f"error: {error}"
        else:
            # After an error others of its request may still be read, for nobody.
            alone = outcome == "right" and not spares
            if fault == _preload.ERROR and reads.hits > before and alone:
                raise Wrong(f"{reads.hits - before} failed reads passed unnoticed")
    reads.disarm()
    experts = rng.sample(range(EXPERTS), 4)
    request(bank, experts)
    if not set(experts) <= set(bank.resident()):
        raise Wrong(f"{experts} were read, but {bank.resident()} are resident")
    return outcome


def case(seed, folder):
    """Make some requests and check each."""
    rng = random.Random(seed)
    return rng.choice([in_good_times, in_bad_times])(rng, folder / "experts.bin")


@contextmanager
def planted():
    """Nobody waits for reads."""
    with mock.patch(f"{__name__}.wait", lambda use, slots: slots + 0):
        yield
