"""Reads of experts fail, end early, are short, late, interrupted or wrong, or files change."""

import errno
import os
import random
import time
from contextlib import contextmanager
from unittest import mock

from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _preload, slots
from tests.adversarial.kinds._streamed import (
    Fixture,
    check,
    drain,
    generate,
    generate_exactly,
    random_options,
)

from glm_fused.streaming.experts import StreamedExperts

NAME = "reads"
QUICK_CASES = 40
SLOW_CASES = 4000
ERRORS = (errno.EIO, errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ENOMEM, errno.EINVAL)
# A reader has to put up with these.
HARMLESS = ("interrupted", "short", "late")
HARMFUL = ("error", "end", "wrong byte", "changed file")
unavailable, environment = slots.unavailable, slots.environment
_state = {}


def prepare(folder):
    """Make a tiny model."""
    _state["fixture"], _state["reads"] = Fixture(folder), _preload.Reads()


def arm(rng, reads, fault):
    """Arm a fault at one read, at a run of them, or here and there."""
    where = rng.choice(["one", "run", "some"])
    first, count, permille = rng.randrange(60), 1, 0
    if where == "run":
        count = rng.randrange(2, 200)
    elif where == "some":
        count, permille = 0, rng.choice([5, 30, 200, 900 if fault in HARMLESS else 300])
    kind, error = _preload.NONE if fault == "changed file" else _preload.ERROR, rng.choice(ERRORS)
    if fault == "interrupted":
        error = errno.EINTR
    elif fault not in ("error", "changed file"):
        kind = {
            "end": _preload.END,
            "short": _preload.SHORT,
            "late": _preload.DELAY,
            "wrong byte": _preload.WRONG_BYTE,
        }[fault]
    reads.arm(kind, first, count, permille, rng.getrandbits(63), error)


@contextmanager
def changed(files):
    """Within the block, files look as if somebody had written to them."""
    times = {file: (file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in files}
    try:
        for file, (accessed, modified) in times.items():
            os.utime(file, ns=(accessed, modified + 1_000_000))
        yield
    finally:
        for file, both in times.items():
            os.utime(file, ns=both)


def settle(reads):
    """Wait for reads that began under a fault: the next request would share their failure."""
    calls = -1
    while calls != reads.calls:
        calls = reads.calls
        time.sleep(0.1)


def under(fault, rng, model, prompt, how):
    """The outcome of a generation, and how many reads were hit."""
    reads = _state["reads"]
    files = model.streaming.source.files if fault == "changed file" else ()
    arm(rng, reads, fault)
    outcome = "right"
    try:
        with changed(files):
            try:
                check(model, prompt, how=how)
            except Exception:
                settle(reads)
                raise
    except Wrong as error:
        raise Wrong(f"{fault} at {reads.hits} of {reads.calls} reads: {error}") from None
    except Exception as error:
        if clear_error(error) is None:
            raise
        outcome = f"error: {error}"
    hits = reads.calls if files else reads.hits
    reads.disarm()
    drain()
    return outcome, hits


def case(seed, folder):
    """Generate some tokens under a fault; then, without it, the same again."""
    rng = random.Random(seed)
    options = random_options(rng)
    fault = rng.choice(HARMLESS + HARMFUL)
    if fault == "wrong byte":
        options["packed"] = True  # only a checksum can tell, which a sidecar has
    fixture, how = _state["fixture"], rng.choice([generate, generate_exactly])
    prompt = rng.choice(fixture.prompts)
    _state["reads"].disarm()
    model = fixture.model(**options)
    outcome, hits = under(fault, rng, model, prompt, how)
    if outcome != "right" and (fault in HARMLESS or hits == 0):
        raise Wrong(f"{fault} at {hits} reads, {options}: {outcome}")
    # Nobody may need a read of lookahead, of mlx-lm's last step, or, past the page cache, of the
    # rest of a block.
    unused = options["spares"] or how is generate or (fault == "wrong byte" and options["direct"])
    if fault == "changed file":
        unused = False  # all reads are hit
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
