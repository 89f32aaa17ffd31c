"""A rank of a line, in one of several programs.

``python pipeline_program.py logits FOLDER FAULT MODEL...`` saves what `steps_of` gives of each
model in ``FOLDER/MODEL.FAULT.RANK.npz``. With a FAULT other than ``none`` a layer does what it must
not.

``python pipeline_program.py turns FOLDER CALLS SECONDS FAULT [DRAFT]`` prints, as JSON, the
tokens of prompts that are continued together, and how often rank 1 had work while rank 0 was at the
next: rank 1 keeps each of the rows that it is given, but for those from the last of so many
``CALLS`` on, until rank 0 has begun with others, or until ``SECONDS`` are over.

``python pipeline_program.py served FOLDER CALLS SECONDS FAULT`` does the same with two texts that a
scheduler generates for, which begin with a token; the first rows are of one of them, and not kept.

``python pipeline_program.py threads`` prints of rank 0 how often another thread ran while it let
go of memory and rank 1 kept it waiting, by `tidy` and by MLX's own function.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, CacheList
from shard_program import bits

import glm_fused.generation.batching.microbatches as microbatches
from glm_fused import Engine, EngineOptions
from glm_fused.generation.batching.leading import follow
from glm_fused.generation.batching.requests import GeneratedToken, GenerationRequest
from glm_fused.generation.batching.scheduler import Scheduler
from glm_fused.generation.drafts import priming
from glm_fused.generation.options import Options
from glm_fused.generation.tidying import tidy
from glm_fused.loader import open_model
from glm_fused.models.layer import DecoderLayer
from glm_fused.models.layers import QuantizedEmbedding
from glm_fused.models.line import Line
from glm_fused.models.pipeline import StagedModel, TakingQuantizedEmbedding
from glm_fused.models.sharded_layers import as_kind
from glm_fused.parallel.watch import Watch

FORMATS = ("bf16", "fp16", "fp32", "fp8", "int8")
STEPS = 64
PROMPTS = [list(range(first, first + 150)) for first in (5, 300, 40, 900)]
BEGINNINGS = [[5], [300]]  # which need no prompt to be taken
HOW = {"max_tokens": 16, "temp": 1.0, "seed": 3}


def steps_of(model, formats=FORMATS):
    """The bits of logits, by name: of prompts in chunks, steps, a draft and a batch.

    The prompt is longer than five times what a query selects.
    """
    rng, length = np.random.default_rng(7), 5 * model.args.index_topk + 20
    found = {}
    for name in formats:
        model.kv_format = name
        tokens = mx.array(rng.integers(0, model.args.vocab_size, (1, length + STEPS + 3)))
        cache, chunk = model.make_cache(), length // 3
        for first in range(0, length, chunk):
            logits, hidden = model.states(tokens[:, first : min(first + chunk, length)], cache)
        mx.eval(logits)
        found[f"{name} prompt"] = logits[:, -8:]
        steps = STEPS if name == "bf16" else 4
        for i in range(length, length + steps):
            found[f"{name} {i - length}"], hidden = model.states(tokens[:, i : i + 1], cache)
        found[f"{name} three"] = model(tokens[:, -3:], cache)
        batch = [CacheList(*(BatchKVCache([0, 5]) for _ in layer.caches)) for layer in cache]
        pair = mx.concatenate([tokens[:, :40], tokens[:, 40:80]])
        found[f"{name} batch"] = model(pair, batch)[:, -1:]
        mx.eval(found[f"{name} batch"])
        for i in range(2):
            found[f"{name} batch {i}"] = model(pair[:, i : i + 1], batch)
        mx.eval(found)
        if model.args.has_mtp:
            drafted = model.draft(tokens[:, :1], hidden, model.make_mtp_cache())
            found[f"{name} draft"] = drafted[0]
    return dict(zip(found, bits(found.values()).values(), strict=True))


class Skipped(DecoderLayer):
    """A layer that fills its cache and changes nothing."""

    def __call__(self, x, *others):
        return x, super().__call__(x, *others)[1]


class Remembered(DecoderLayer):
    """A layer whose choice of keys `Late` takes."""

    def __call__(self, *given):
        x, Remembered.choice = super().__call__(*given)
        return x, Remembered.choice


class Late(DecoderLayer):
    """A layer that takes a choice of keys from before the last."""

    def __call__(self, x, span, angles, cache, selection):
        choice = None if selection is None else Remembered.choice
        return super().__call__(x, span, angles, cache, choice)


FAULTS = {"none": {}, "skipped": {5: Skipped}, "late": {0: Remembered, 2: Late}}


def plant(model, fault):
    """Have some layers do what they must not, those that are here."""
    layers = list(model.model.layers)
    for i, kind in FAULTS[fault].items():
        if isinstance(layers[i], DecoderLayer):
            layers[i] = as_kind(kind, layers[i])
    model.model.update_modules({"layers": layers})


def save_logits(line, folder, fault, *paths):
    for path in map(Path, paths):
        opened = open_model(path, "auto", None, mtp=True, ranks=line)
        opened.read()
        plant(opened.model, fault)
        np.savez(f"{folder}/{path.name}.{fault}.{line.rank}.npz", **steps_of(opened.model))


class Turns:
    """How far rank 0 is, which it says in a file; rank 1 waits for it."""

    def __init__(self, folder, calls, seconds, free=0):
        self.file, self.last, self.seconds = Path(folder) / "begun", int(calls), float(seconds)
        self.free = free  # of the first calls, which are not kept
        self.begun = self.kept = 0
        self.is_over = self.is_drafting = False

    def begin(self, rows):
        """Rank 0 has the rows of so many calls."""
        mx.eval(rows)
        if not self.is_drafting:
            with self.file.open("a") as file:
                file.write(".")
        return rows

    def draft(self, draft, *given):
        """Rank 0 has the layer that drafts take rows, too."""
        self.is_drafting = True
        found = draft(*given)
        self.is_drafting = False
        return found

    def keep(self, rows):
        """Rank 1 has them, too, and waits for the next to be begun."""
        mx.eval(rows)
        self.begun += 1
        if self.begun <= self.free or self.begun >= self.last:
            return rows
        until = time.monotonic() + self.seconds
        while not self.is_over and self.file.stat().st_size <= self.begun:
            self.is_over = time.monotonic() > until
            time.sleep(0.003)
        self.kept += not self.is_over
        return rows


@contextlib.contextmanager
def counted(line, turns, draft="off"):
    """An engine whose model counts."""

    class Beginning(QuantizedEmbedding):
        def __call__(self, tokens):
            return turns.begin(super().__call__(tokens))

    class Keeping(TakingQuantizedEmbedding):
        def __call__(self, tokens):
            return turns.keep(super().__call__(tokens))

    options = EngineOptions(ranks=line, prefill_step_size=60, draft=draft)
    with Engine("demo", options) as engine:
        decoder = engine.model.model
        engine.model.draft = partial(turns.draft, engine.model.draft)
        kind = Beginning if line.is_first else Keeping
        decoder.update_modules({"embed_tokens": as_kind(kind, decoder.embed_tokens)})
        yield engine
        line.finish()


def take_turns(line, folder, calls, seconds, fault, draft="off"):
    if fault == "one batch":
        microbatches.turns_of = lambda model: 1
    if fault == "waits for prompts":
        completed = StagedModel.completed

        def completed_now(model, found):
            logits, hidden = completed(model, found)
            mx.eval(hidden)
            return logits, hidden

        StagedModel.completed = completed_now
    if fault == "primes at once":
        priming.turns_of = lambda model: 1
    turns = Turns(folder, calls, seconds)
    with counted(line, turns, draft if draft == "off" else int(draft)) as engine:
        found = engine.generate_batch(PROMPTS, **HOW)
    tokens = [answer.tokens for answer in found.answers]
    print(json.dumps({"tokens": tokens, "calls": turns.begun, "kept": turns.kept}))


def serve(line, folder, calls, seconds, fault):
    if fault == "one batch":
        microbatches.turns_of = lambda model: 1
    turns, found = Turns(folder, calls, seconds, free=1), []
    with Watch(mx.distributed.init()) as watch, counted(line, turns) as engine:
        if line.is_first:
            found = scheduled(engine, watch)
        else:
            follow(engine.model, engine.tokenizer, None, None, watch.hear)
    print(json.dumps({"tokens": found, "calls": turns.begun, "kept": turns.kept}))


def scheduled(engine, watch):
    """The tokens of texts that are there at once when rank 0's scheduler begins."""
    scheduler, ended = Scheduler(engine, others=watch), threading.Semaphore(0)
    found = [[] for _ in BEGINNINGS]

    def listener(tokens):
        def on_event(event):
            if isinstance(event, GeneratedToken):
                tokens.append(event.token)
                if event.finish_reason is not None:
                    ended.release()

        return on_event

    with scheduler._changed:
        for tokens, into in zip(BEGINNINGS, found, strict=True):
            scheduler.submit(GenerationRequest(tokens, Options(**HOW)), listener(into))
    for _ in found:
        assert ended.acquire(timeout=200)
    scheduler.close()
    return found


def count_turns_of_threads(line):
    model, ticks = StagedModel.__new__(StagedModel), []
    object.__setattr__(model, "line", line)

    def tick():
        while True:
            ticks.append(None)
            time.sleep(0.01)

    found = []
    for let_go in (lambda: tidy(model), mx.clear_cache):
        if line.is_last:
            time.sleep(1)
            mx.eval(line.hand_back(mx.ones(1)))
            continue
        mx.eval(mx.ones(1 << 20) + 1)  # memory to let go of
        mx.async_eval(line.take_back((1,), mx.float32))
        if not ticks:
            threading.Thread(target=tick, daemon=True).start()
        before = len(ticks)
        let_go()
        found.append(len(ticks) - before)
    print(json.dumps(found))


def main(program, *how):
    mx.set_default_device(mx.cpu)
    line = Line(mx.distributed.init(strict=True, backend="ring"))
    programs = {
        "logits": save_logits, "turns": take_turns, "served": serve,
        "threads": count_turns_of_threads,
    }  # fmt: skip
    programs[program](line, *how)


if __name__ == "__main__":
    main(*sys.argv[1:])
