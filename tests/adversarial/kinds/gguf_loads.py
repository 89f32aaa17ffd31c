"""Reads of a GGUF's weights fail while a model is loaded, or later, as `loads` says."""

from tests.adversarial.kinds import _preload, loads
from tests.adversarial.kinds._gguf import FlashMoeFixture, GgufFixture

NAME = "gguf_loads"
QUICK_CASES = 40
SLOW_CASES = 1000
PIECE = loads.PIECE
unavailable, environment, planted = loads.unavailable, loads.environment, loads.planted
_fixtures = []


def prepare(folder):
    """Make a tiny model of each kind."""
    kinds = {"gguf": GgufFixture, "flash-moe": FlashMoeFixture}
    _fixtures[:] = (kind(folder / name, prompts=4) for name, kind in kinds.items())
    loads._state["reads"] = _preload.Reads(loads=True)


def case(seed, folder):
    """A case of `loads` on one of the models."""
    loads._state["fixture"] = _fixtures[seed % 2]
    return loads.case(seed, folder)
