"""A rank that decodes with drafts: tokens, logits and counts of each of `CASES`.

``python shard_drafts_program.py FOLDER tensor|pipeline MODE MODEL`` saves them in
``FOLDER/RANK.npz`` and prints the counts. Rank 0 has a steady clock, the others' says that they
become slower. With the mode "times" each rank counts its own times; with "depth" rank 1 drafts one
token less than it should, with "none" no token, with "keeps" it keeps all drafts in its cache, and
with "others" it has drafts of its own; with "early" rank 0 has what is awaited overtake the rest.
"""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import numpy as np
from test_drafts import CODE, decode

from glm_fused import Engine, EngineOptions
from glm_fused.generation import decoding, lockstep
from glm_fused.generation.batching import batch
from glm_fused.generation.decoding import Drafting
from glm_fused.generation.drafts import mtp
from glm_fused.generation.drafts.depth import Depth
from glm_fused.generation.drafts.options import DraftOptions
from glm_fused.models.line import Line
from glm_fused.models.pipeline import of_first
from glm_fused.models.ranks import Ranks
from glm_fused.parallel.watch import Watch

SAMPLED = {"temp": 0.7, "seed": 3}
CASES = {  # the source, the depth, and how tokens are chosen
    "layer": ("mtp", 3, {}),
    "look-up": ("lookup", 5, {}),
    "auto": ("mtp+lookup", "auto", {}),
    "sampled": ("mtp+lookup", "auto", SAMPLED),
}
BATCH = [CODE, "def write(path, text):\n", "class Reader:\n"]
TOKENS, CHOSEN_TOKENS = 24, 48  # without and with "auto", which measures plain steps first


def cases_of(engine):
    """What each case gives: tokens, bits of logits, and what became of drafts.

    And the keys of the layer, where it is.
    """
    found = {}
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    for name, (source, depth, how) in CASES.items():
        options = DraftOptions(depth, source)
        drafting = Drafting.of(options, model)
        tokens = CHOSEN_TOKENS if depth == "auto" else TOKENS
        given, logits, decoded = decode(model, prompt, drafting, tokens, **how)
        bits = np.stack([np.array(row) for row in logits])
        drafts = decoded.statistics.describe(None)
        found[name] = given, bits, [drafts["proposed"], drafts["accepted"]]
        if name == "layer" and (entries := drafting.drafter._cache.caches):
            keys = entries[0].keys[..., : entries[0].offset, :]
            found["layer's keys"] = [], np.array(keys.view(mx.uint16)), []
    together = engine.generate_batch(BATCH, raw=True, max_tokens=CHOSEN_TOKENS)
    given = [answer.tokens for answer in together.answers]
    found["batch"] = given, np.zeros(0), [together.drafts["proposed"]]
    return found


class Clock:
    """The time of a machine on which whatever is timed takes so many times as long as before."""

    def __init__(self, factor):
        self._factor, self._step, self._now = factor, 1e-3, 0.0

    def perf_counter(self):
        self._now += self._step
        self._step *= self._factor
        return self._now


class OwnTimes(lockstep.Lockstep):
    """Ranks that count their own times."""

    def follow(self, begun, seconds=None):
        super().follow(begun, seconds)
        return seconds

    def shared(self, seconds):
        super().shared(seconds)
        return seconds


def plant(mode, rank):
    """Make the faults of a mode."""
    decoding.time = batch.time = Clock(1.1 if rank else 1.0)
    if mode == "times":
        lockstep.Lockstep = OwnTimes
    if mode in ("depth", "none") and rank == 1:
        chosen = Depth.next

        def another(self, *args):
            plan = chosen(self, *args)
            less = plan and plan._replace(depth=plan.depth - 1)
            return less if mode == "depth" else None

        Depth.next = another
    if mode == "keeps" and rank == 1:
        decoding.trim = lambda cache, columns: None
    if mode == "others" and rank == 1:
        mtp.of_first = lambda model, tokens: of_first(model, tokens) + 1
    if mode == "early" and rank == 0:
        asked = Line.ask_for

        def early(line, found, at_once):
            if at_once:
                mx.async_eval(found)
            asked(line, found, at_once)

        Line.ask_for = early


def main(folder, shard, mode, model):
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    ranks = Line(group) if shard == "pipeline" else Ranks(group)
    plant(mode, ranks.rank)
    options = EngineOptions(draft="auto", ranks=ranks, prefill_step_size=16)
    with Watch(group), Engine(model, options) as engine:
        found = cases_of(engine)
        if shard == "pipeline":
            ranks.finish()
    arrays = {f"{name} {i}": part for name, parts in found.items() for i, part in enumerate(parts)}
    np.savez(f"{folder}/{ranks.rank}.npz", **arrays)
    print(json.dumps({name: counts for name, (_, _, counts) in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
