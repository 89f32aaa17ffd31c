"""Every single read of a prompt and of 50 tokens after it fails once, from both kinds of files."""

from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _preload, reads
from tests.adversarial.kinds._streamed import Fixture, check

NAME = "every_read"
STEPS = 50
QUICK_CASES = 16
SLOW_CASES = 2400  # these are all of them, as `prepare` makes sure
SLOTS = 3
WAYS = [(packed, direct) for packed in (False, True) for direct in (False, True)]
unavailable, environment, planted = reads.unavailable, reads.environment, reads.planted
_state = {}


def prepare(folder):
    """Make a tiny model and count the reads of each way of reading, made one at a time."""
    fixture = _state["fixture"] = Fixture(folder, prompts=2, steps=STEPS)
    _state["reads"] = _preload.Reads()
    _state["prompt"] = fixture.prompts[1]  # 10 tokens
    _state["positions"] = [(way, position) for way in WAYS for position in range(count(*way))]
    if len(_state["positions"]) > SLOW_CASES:
        raise Wrong(f"{len(_state['positions'])} reads, but only {SLOW_CASES} cases")


def model(packed, direct):
    """The model with one read at a time, which keeps the order of reads the same."""
    return _state["fixture"].model(packed, direct=direct, slots=SLOTS, policy="lru", depth=1)


def count(packed, direct):
    """How many reads a run has in which none fails."""
    _state["reads"].disarm()
    check(model(packed, direct), _state["prompt"], STEPS)
    return _state["reads"].calls


def case(seed, folder):
    """The read at one position fails; `seed` counts positions, from start to end in large steps."""
    positions, failing = _state["positions"], _state["reads"]
    (packed, direct), position = positions[seed * 601 % len(positions)]
    where = f"read {position}, packed {packed}, direct {direct}"
    failing.disarm()
    streamed = model(packed, direct)
    failing.arm(_preload.ERROR, position, 1)
    try:
        check(streamed, _state["prompt"], STEPS)
    except Wrong as error:
        raise Wrong(f"{where}: {error}") from None
    except Exception as error:
        if clear_error(error) is None:
            raise
        return f"error: {error}"
    raise Wrong(f"{where} of {failing.calls}: EIO passed unnoticed ({failing.hits} hits)")
