"""Threads that share one streamed model, one bank or the pool act as if one after another."""

import random
import threading
from contextlib import contextmanager
from functools import partial
from unittest import mock

import mlx.core as mx
import numpy as np
from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _preload
from tests.adversarial.kinds import slots as bank_of_slots
from tests.adversarial.kinds._streamed import (
    Fixture,
    check,
    checked,
    drain,
    generate,
    generate_exactly,
    random_options,
)
from tests.adversarial.kinds.slots import BYTES, EXPERTS, check_slots, make_bank, resolve

from glm_fused import _ext, ops
from glm_fused.formats.weights import dense_format
from glm_fused.selftest.synthetic import Bits
from glm_fused.streaming.experts import StreamedExperts

NAME = "threads"
QUICK_CASES = 16
SLOW_CASES = 600
TIMEOUT = 60.0
PIECE = 300  # not more, as MLX keeps the streams of threads that are gone
unavailable, environment = bank_of_slots.unavailable, bank_of_slots.environment
_state = {}


def prepare(folder):
    """Make a tiny model, a file of experts, and operands of ops with their serial results."""
    _state["fixture"] = Fixture(folder)
    bank_of_slots.prepare(folder)
    _state["reads"] = _preload.Reads()
    _state["ops"] = [(call, mx.array(call())) for call in _calls()]
    mx.eval([result for _, result in _state["ops"]])


def _calls():
    """Yield calls of ops on operands of their own."""
    for seed in range(6):
        bits = Bits(seed)
        x = bits.floats((2, 128), mx.bfloat16)
        gate, up = (
            bits.weight((8, 96, 128), dense_format(mx.bfloat16), mx.bfloat16) for _ in range(2)
        )
        down = bits.weight((8, 128, 96), dense_format(mx.bfloat16), mx.bfloat16)
        chosen = mx.array(bits.choices(2, 3, 8))
        scores = mx.abs(bits.floats((2, 3), mx.float32))
        mx.eval(x, gate.planes[0], up.planes[0], down.planes[0], chosen, scores)
        yield lambda a=(x, gate, up, down, chosen, scores): ops.moe_decode(*a)
        w = bits.weight((512, 128), dense_format(mx.bfloat16), mx.bfloat16)
        mx.eval(w.planes[0])
        yield lambda a=(x, w): ops.quantized_matvec(*a)


def together(jobs):
    """Run every job in a thread of its own; raise what the first that failed raised."""
    barrier, errors = threading.Barrier(len(jobs)), []

    def run(job):
        try:
            barrier.wait()
            job()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def seeded(rng, run):
    """A job with a random generator of its own, which is seeded now."""
    return partial(run, random.Random(rng.getrandbits(30)))


def generations(rng, folder):
    """Jobs of threads that generate; others drop what they built or change the pool's size."""
    model = _state["fixture"].model(**random_options(rng))
    others = [seeded(rng, partial(drop, model)), seeded(rng, resize)]
    jobs = [seeded(rng, partial(say, model)) for _ in range(rng.choice([2, 2, 3, 4, 7]))]
    return jobs + rng.choice([[], [], others[:1], others[1:], others])


def failing(rng, folder):
    """Jobs of threads that generate while reads fail: each ends with its tokens or an error."""
    model = _state["fixture"].model(**random_options(rng))
    jobs = [seeded(rng, partial(try_to_say, model)) for _ in range(rng.choice([2, 3, 4]))]
    seed, permille = rng.getrandbits(63), rng.choice([10, 50, 300])
    _state["reads"].arm(rng.choice([_preload.ERROR, _preload.END]), 0, 0, permille, seed)
    return jobs


def interleaved(rng, folder):
    """A job of one thread with several generations, some of which are dropped; reads may fail."""
    model = _state["fixture"].model(**random_options(rng))
    if rng.random() < 0.5:
        _state["reads"].arm(_preload.ERROR, rng.randrange(80), 1)
    return [seeded(rng, partial(take_turns, model))]


def take_turns(model, rng):
    """Generate in turns, a token each; every generation ends with its tokens or an error."""
    fixture = _state["fixture"]
    voices = [
        checked(model, rng.choice(fixture.prompts), 3, rng.choice([generate, generate_exactly]))
        for _ in range(rng.choice([2, 3]))
    ]
    while voices:
        voice = rng.choice(voices)
        try:
            if next(voice, None) is None or rng.random() < 0.05:
                voices.remove(voice)
                voice.close()
        except RuntimeError as error:
            if clear_error(error) is None or not _state["reads"].hits:
                raise
            voices.remove(voice)


def try_to_say(model, rng):
    """Generate, and compare what was said before the first error."""
    try:
        say(model, rng)
    except RuntimeError as error:
        if clear_error(error) is None or not _state["reads"].hits:
            raise


def say(model, rng):
    """Generate, and compare."""
    prompt, how = rng.choice(_state["fixture"].prompts), rng.choice([generate, generate_exactly])
    check(model, prompt, 3, how)


def drop(model, rng):
    """Build graphs of steps and let them go, evaluated or not."""
    for token in range(3, 3 + rng.randrange(1, 6)):
        logits = model(mx.array([[token, 200]]))
        if rng.random() < 0.5:
            mx.async_eval(logits)


def resize(rng):
    """Change the pool's size a few times."""
    for _ in range(10):
        _ext.set_num_threads(rng.randrange(1, 6))


def operations(rng, folder):
    """Jobs of threads that run ops while another changes the pool's size."""
    return [seeded(rng, operate) for _ in range(rng.randrange(2, 7))] + [seeded(rng, resize)]


def operate(rng):
    """Run ops, and compare."""
    for _ in range(20):
        call, expected = rng.choice(_state["ops"])
        if not mx.array_equal(call(), expected):
            raise Wrong("an op gives other bits than before")


def requests(rng, folder):
    """Jobs of threads that request experts of one bank, hold them and look at them."""
    count = rng.randrange(2, 6)
    bank = make_bank(rng, folder / "experts.bin", at_least=2 * count + 2)
    return [seeded(rng, partial(use, bank)) for _ in range(count)]


def use(bank, rng):
    """Request experts; drop them, look at them as they are, or within the request's graph."""
    for _ in range(15):
        experts = rng.sample(range(EXPERTS), rng.randrange(1, 3))
        (lease, slots), way = resolve(bank, experts), rng.choice(["drop", "hold", "graph", "graph"])
        if way == "hold":
            mx.eval(slots)
            check_slots(bank, slots, experts)
        elif way == "graph":
            read = bank.arrays[0][slots[0]].astype(mx.int32).sum(axis=-1)
            read = lease.release(read, slots)
            del slots
            if read.tolist() != [BYTES[0] * e for e in experts]:
                raise Wrong(f"experts {experts} read as {read.tolist()}")


def case(seed, folder):
    """Run the jobs of one storm; afterwards one thread alone has to get the right tokens too."""
    rng = random.Random(seed)
    storm = rng.choice([generations, generations, failing, interleaved, operations, requests])
    before = _ext.num_threads()
    try:
        together(storm(rng, folder))
    except Wrong as error:
        raise Wrong(f"{storm.__name__}: {error}") from None
    except Exception as error:
        # No thread may notice another.
        raise Wrong(f"{storm.__name__}: {type(error).__name__}: {error}") from None
    finally:
        _ext.set_num_threads(before)
        _state["reads"].disarm()
        drain()
    if storm in (generations, failing, interleaved):
        check(_state["fixture"].shared, rng.choice(_state["fixture"].prompts), 2)
    return "right"


@contextmanager
def planted():
    """Leases end at once, and nobody waits for reads."""

    def apply(self, use, x, pending, scores, after):
        slots = mx.array(np.array(mx.depends(pending, after)))
        return ops.moe_decode(x, *self._weights, slots, scores)

    with mock.patch.object(StreamedExperts, "_apply", apply):
        yield
