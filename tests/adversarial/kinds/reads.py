"""Reads of experts that fail, end early, are short, late, interrupted or wrong."""

import errno
import random
from contextlib import contextmanager
from unittest import mock

from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _preload, slots
from tests.adversarial.kinds._streamed import (
    Fixture,
    check,
    generate,
    generate_exactly,
    random_options,
)

from glm_fused.slots import StreamedExperts

NAME = "reads"
QUICK_CASES = 60
SLOW_CASES = 25_000
ERRORS = (errno.EIO, errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ENOMEM, errno.EINVAL)
# What a reader has to put up with.
HARMLESS = ("interrupted", "short", "late")
HARMFUL = ("error", "end", "wrong byte")
unavailable, environment = slots.unavailable, slots.environment
_state = {}


def prepare(folder):
    """A tiny model."""
    _state["fixture"], _state["reads"] = Fixture(folder), _preload.Reads()


def arm(rng, reads, fault):
    """At one read, at a run of them, or here and there."""
    where = rng.choice(["one", "run", "some"])
    first, count, permille = rng.randrange(60), 1, 0
    if where == "run":
        count = rng.randrange(2, 200)
    elif where == "some":
        count, permille = 0, rng.choice([5, 30, 200, 900 if fault in HARMLESS else 300])
    kind, error = _preload.ERROR, rng.choice(ERRORS)
    if fault == "interrupted":
        error = errno.EINTR
    elif fault != "error":
        kind = {
            "end": _preload.END,
            "short": _preload.SHORT,
            "late": _preload.DELAY,
            "wrong byte": _preload.WRONG_BYTE,
        }[fault]
    reads.arm(kind, first, count, permille, rng.getrandbits(63), error)


def case(seed, folder):
    """A prompt and some tokens under a fault; then, without it, the same again."""
    fixture, reads = _state["fixture"], _state["reads"]
    rng = random.Random(seed)
    options = random_options(rng)
    fault = rng.choice(HARMLESS + HARMFUL)
    if fault == "wrong byte":
        options["packed"] = True  # nothing but a checksum can tell
    prompt, how = rng.choice(fixture.prompts), rng.choice([generate, generate_exactly])
    reads.disarm()
    model = fixture.model(**options)
    arm(rng, reads, fault)
    outcome = "right"
    try:
        check(model, prompt, how=how)
    except Wrong as error:
        raise Wrong(f"{fault} at {reads.hits} of {reads.calls} reads, {options}: {error}") from None
    except Exception as error:
        if clear_error(error) is None:
            raise
        outcome = f"error: {error}"
    hits = reads.hits
    reads.disarm()
    if outcome != "right" and (fault in HARMLESS or hits == 0):
        raise Wrong(f"{fault} at {hits} reads, {options}: {outcome}")
    # Of lookahead, of mlx-lm's last step, or of blocks around what is read past the page cache.
    unused = options["spares"] or how is generate or (fault == "wrong byte" and options["direct"])
    if outcome == "right" and fault in HARMFUL and hits > 0 and not unused:
        raise Wrong(f"{fault} at {hits} reads passed unnoticed, {options}")
    if outcome == "right" and rng.random() < 0.8:
        return outcome
    try:
        check(model, prompt)
    except Exception as error:
        raise Wrong(f"after {fault}, {options}: {outcome}; then {error!r}") from None
    return outcome


@contextmanager
def planted():
    """Nobody waits for what was asked for, as if a failed read were a good one."""

    def apply(self, use, x, pending, scores, after):
        from glm_fused import ops

        return ops.moe_decode(x, *self._weights, abs(pending), scores)

    with mock.patch.object(StreamedExperts, "_apply", apply):
        yield
