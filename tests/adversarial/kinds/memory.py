"""Memory cannot be had: one allocation of the extension fails, or all from one on."""

import random
import sys
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _preload, slots
from tests.adversarial.kinds._memory import MEMORY, Faults
from tests.adversarial.kinds._streamed import Fixture, generate_exactly, random_options

from glm_fused import _ext, ops
from glm_fused.formats.weights import dense_format
from glm_fused.selftest.synthetic import Bits

NAME = "memory"
QUICK_CASES = 24
SLOW_CASES = 2000
TIMEOUT = 60.0
unavailable = slots.unavailable
_state = {}


def environment(folder):
    """The environment in which allocations fail where they are told to."""
    return {"LD_PRELOAD": _preload.build("faulty_memory")}


def prepare(folder):
    """Make ops with what they give, and a tiny streamed model."""
    _ext.set_num_threads(4)
    _state["faults"], _state["fixture"] = Faults(), Fixture(folder)
    _state["ops"] = [(call, mx.array(call())) for call in _calls()]
    mx.eval([result for _, result in _state["ops"]])


def _calls():
    """Yield calls of ops that are large enough for the pool, on operands of their own."""
    for seed in range(4):
        bits = Bits(seed)
        x = bits.floats((3, 128), mx.bfloat16)
        gate, up = (
            bits.weight((8, 96, 128), dense_format(mx.bfloat16), mx.bfloat16) for _ in range(2)
        )
        down = bits.weight((8, 128, 96), dense_format(mx.bfloat16), mx.bfloat16)
        chosen = mx.array(bits.choices(3, 3, 8))
        scores = mx.abs(bits.floats((3, 3), mx.float32))
        w = bits.weight((1024, 128), dense_format(mx.bfloat16), mx.bfloat16)
        bias, q = bits.floats((1024,), mx.float32), bits.floats((1, 3, 4, 64), mx.bfloat16)
        keys, weights = bits.floats((1, 900, 64), mx.bfloat16), bits.floats((1, 3, 4), mx.float32)
        mx.eval(
            x,
            gate.planes[0],
            up.planes[0],
            down.planes[0],
            chosen,
            scores,
            w.planes[0],
            bias,
            q,
            keys,
        )
        yield lambda a=(x, gate, up, down, chosen, scores): ops.moe_decode(*a)
        yield lambda a=(x, w): ops.quantized_matvec(*a)
        yield lambda a=(x, w.planes[0], bias): ops.router_topk(*a, top_k=8)[1]
        yield lambda a=(q, keys, weights): ops.indexer_topk(*a, 16, scale=0.1)
        yield lambda a=(q, keys): ops.sparse_mla_decode(*a, rank=64, scale=0.1)


def evaluate(result):
    mx.eval(result)
    return result


def run_op(rng):
    """A function that runs one op and tells whether it was right."""
    call, expected = rng.choice(_state["ops"])
    return lambda: bool(mx.array_equal(evaluate(call()), expected).item())


def run_model(rng):
    """A function that runs a prompt and two tokens of a streamed model; it says if it was right."""
    model = _state["fixture"].model(**random_options(rng))
    prompt = rng.choice(_state["fixture"].prompts)
    return lambda: tokens(generate_exactly(model, prompt, 2)) == prompt.expected[:2]


def tokens(generated):
    """The tokens of a generation's steps."""
    return tuple(token for token, _ in generated)


def case(seed, folder):
    """Do the same work three times: to count its allocations, with a fault, and after it."""
    rng, faults = random.Random(seed), _state["faults"]
    work = run_op(rng) if rng.random() < 0.8 else run_model(rng)
    faults.arm(MEMORY, -1)
    if not work():
        raise Wrong("without a fault")
    calls = faults.calls(MEMORY)
    outcome, right = "right", False
    faults.arm(MEMORY, rng.randrange(calls + 1), rng.random() < 0.3)
    try:
        right = work()
    except Exception as error:
        if not isinstance(error, MemoryError) and clear_error(error) is None:
            raise
        outcome = f"error: {type(error).__name__} {error}"
    finally:
        hits = faults.hits(MEMORY)
        faults.disarm(MEMORY)
    if outcome == "right" and not right:
        raise Wrong(f"{hits} of {calls} allocations failed unnoticed")
    if outcome != "right" and hits == 0:
        raise Wrong(f"no allocation failed, {outcome}")
    for again in range(3):  # reads that began without memory may still fail
        try:
            right = work()
            break
        except RuntimeError:
            if again == 2:
                raise
    if not right:
        raise Wrong(f"after {outcome}")
    return outcome


@contextmanager
def planted():
    """The error of an evaluation is lost."""

    def lose(result):
        try:
            mx.eval(result)
        except Exception:
            return mx.zeros_like(result)
        return result

    with mock.patch.object(sys.modules[__name__], "evaluate", lose):
        yield
