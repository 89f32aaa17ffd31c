"""Threads cannot be created, for the pool of the kernels and for reads."""

import random
import sys
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from tests.adversarial.harness import Wrong
from tests.adversarial.kinds import memory, slots
from tests.adversarial.kinds._memory import THREADS, Faults
from tests.adversarial.kinds.slots import EXPERTS, check_slots, make_bank, resolve

from glm_fused import _ext, ops
from glm_fused.formats.weights import dense_format
from glm_fused.selftest.synthetic import Bits

NAME = "thread_creation"
QUICK_CASES = 60
SLOW_CASES = 1000
unavailable, environment = memory.unavailable, memory.environment
set_num_threads = _ext.set_num_threads
_state = {}


def prepare(folder):
    """Make an op that is large enough for the pool, and a file of experts."""
    bits = Bits(1)
    x, w = (
        bits.floats((1, 256), mx.float32),
        bits.weight((1024, 256), dense_format(mx.float32), mx.float32),
    )
    contents = (bytes([e]) * sum(slots.BYTES) for e in range(EXPERTS))
    (folder / "experts.bin").write_bytes(b"".join(contents))
    _state["faults"], _state["call"] = Faults(), lambda: ops.quantized_matvec(x, w)
    _state["expected"] = mx.array(_state["call"]())
    mx.eval(_state["expected"])


def check_pool(rng, faults):
    """The pool runs on the threads before the first that failed, and gives the same."""
    wanted, first = rng.randrange(2, 12), rng.randrange(12)
    faults.arm(THREADS, first, rng.random() < 0.5)
    set_num_threads(wanted)
    right = mx.array_equal(_state["call"](), _state["expected"]).item()
    threads, expected = _ext.num_threads(), min(wanted, first + 1)
    failed, hits = first < wanted - 1, faults.hits(THREADS)
    faults.disarm(THREADS)
    if not right or threads != expected or (hits > 0) != failed:
        raise Wrong(f"{wanted} threads, call {first} fails {hits} times: {threads}, right: {right}")


def check_reader(rng, faults, file):
    """A reader reads on the threads that it has, or says that it has none."""
    first = rng.randrange(5)
    faults.arm(THREADS, first, rng.random() < 0.5)
    try:
        bank = make_bank(rng, file, at_least=5)
    except RuntimeError as error:
        if first or "no thread could be created" not in str(error):
            raise
        return f"error: {error}"
    finally:
        hits = faults.hits(THREADS)
        faults.disarm(THREADS)
    if first == 0:
        raise Wrong(f"a reader without threads was made, {hits} failed")
    experts = rng.sample(range(EXPERTS), 4)
    chosen = resolve(bank, experts)[1]
    mx.eval(chosen)
    check_slots(bank, chosen, experts)
    return "right"


def case(seed, folder):
    """Use a pool and a reader while threads cannot be created from some point on; then without."""
    rng, faults = random.Random(seed), _state["faults"]
    check_pool(rng, faults)
    outcome = check_reader(rng, faults, folder / "experts.bin")
    set_num_threads(3)
    if _ext.num_threads() != 3:
        raise Wrong(f"{_ext.num_threads()} threads where 3 can be created")
    return outcome


@contextmanager
def planted():
    """The pool is never made anew."""
    with mock.patch.object(sys.modules[__name__], "set_num_threads", lambda n: None):
        yield
