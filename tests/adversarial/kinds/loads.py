"""Reads of a checkpoint's weights fail while a model is loaded, or later where it is lazy."""

import random
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from tests.adversarial.harness import Unclear, Wrong, clear_error
from tests.adversarial.kinds import _preload, reads, slots
from tests.adversarial.kinds._streamed import Fixture, check, drain

from glm_fused import loader
from glm_fused.streaming.options import StreamOptions

NAME = "loads"
QUICK_CASES = 40
SLOW_CASES = 1000
PIECE = slots.PIECE
unavailable, environment = slots.unavailable, slots.environment
_state = {}


def prepare(folder):
    """Make a tiny model."""
    _state["fixture"], _state["reads"] = Fixture(folder, prompts=4), _preload.Reads(loads=True)


def case(seed, folder):
    """Load and generate under a fault; a model that is not refused is right then and afterwards."""
    fixture, failing = _state["fixture"], _state["reads"]
    rng = random.Random(seed)
    fault = rng.choice([*reads.HARMLESS, "error", "end"])
    lazy, streamed = rng.random() < 0.4, rng.random() < 0.4
    sidecar = fixture.unpacked
    stream = StreamOptions(budget=8 << 30, slots=4, sidecar=sidecar) if streamed else None
    prompt = rng.choice(fixture.prompts)
    what = f"{fault}, lazy {lazy}, streamed {streamed}"
    reads.arm(rng, failing, fault)
    model, outcome = None, "right"
    try:
        model, _ = loader.load_model(fixture.checkpoint, lazy=lazy, stream=stream)
        check(model, prompt, 2)
    except Wrong as error:
        raise Wrong(f"{what}, {failing.hits} hits: {error}") from None
    except Exception as error:
        if clear_error(error) is None:
            raise
        outcome = f"error: {error}"
    hits = failing.hits
    if outcome != "right":  # several reads may have failed, of which MLX has raised one
        reads.settle(failing)
        drain()
    failing.disarm()
    if outcome != "right" and (fault in reads.HARMLESS or hits == 0):
        raise Wrong(f"{what}, {hits} hits: {outcome}")
    if outcome == "right" and fault not in reads.HARMLESS and hits > 0:
        raise Wrong(f"{what}: {hits} failed reads passed unnoticed")
    if outcome != "right" and not lazy and "[loader] " not in outcome:
        raise Unclear(f"{what}: {outcome}")
    if outcome != "right" and model is not None and not lazy:
        raise Wrong(f"{what}: an error after everything was read: {outcome}")
    return outcome


@contextmanager
def planted():
    """A weight that cannot be read is taken as it is."""

    def materialize(model, checkpoint, sources):
        try:
            mx.eval(model.parameters())
        except RuntimeError:
            return

    with mock.patch.object(loader, "read_parameters", materialize):
        yield
