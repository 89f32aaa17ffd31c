"""Reads of a GGUF's experts, or of a Flash-MoE sidecar's, fail as `reads` says."""

from tests.adversarial.kinds import _preload, reads
from tests.adversarial.kinds._gguf import FlashMoeFixture, GgufFixture

NAME = "gguf_reads"
QUICK_CASES = 40
SLOW_CASES = 4000
unavailable, environment, planted = reads.unavailable, reads.environment, reads.planted
_fixtures = []


def prepare(folder):
    """Make a tiny model of each kind."""
    _fixtures[:] = GgufFixture(folder / "gguf"), FlashMoeFixture(folder / "flash-moe")
    reads._state["reads"] = _preload.Reads()


def case(seed, folder):
    """A case of `reads` on one of the models."""
    reads._state["fixture"] = _fixtures[seed % 2]
    return reads.case(seed, folder)
