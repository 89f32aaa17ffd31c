"""What rank 0 tells the others of its turns, and that they make the calls of the model it makes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from served_ranks import CODE

from glm_fused.generation.batching import microbatches
from glm_fused.generation.batching.leading import follow
from glm_fused.generation.batching.requests import Failure, GeneratedToken, GenerationRequest
from glm_fused.generation.batching.scheduler import Scheduler
from glm_fused.generation.options import Options


class Said:
    """In place of other ranks: keeps what they are told."""

    def __init__(self):
        self.lines, self.error = [], None

    def say(self, text):
        self.lines.append(text)

    def fail(self, error):
        self.error = error


class Barred:
    """A constraint that allows every token but one, and fails after some."""

    def __init__(self, vocabulary, fails_after):
        self._allowed, self._left = np.arange(vocabulary) != 10, fails_after

    def allowed(self):
        if not self._left:
            raise ValueError("it is over")
        return mx.array(self._allowed)

    def accept(self, token):
        assert token != 10
        self._left -= 1


class TestFollowing:
    """The calls of the model, as rank 0 and as another rank makes them, in one process."""

    @pytest.fixture
    def calls(self, model, monkeypatch):
        """Every call of the model: how many tokens of each text, and where in the cache."""
        found, forward = [], type(model).states

        def states(self, tokens, cache=None):
            found.append((tokens.shape, cache[0].size()))
            return forward(self, tokens, cache)

        def call(self, tokens, cache=None):
            return self.head(states(self, tokens, cache)[1])

        monkeypatch.setattr(type(model), "states", states)
        monkeypatch.setattr(type(model), "__call__", call)
        return found

    def lead(self, model, engine, store):
        """Requests of several kinds; returns what the other ranks are told."""
        said, tokens = Said(), engine.encode(CODE, raw=True)
        scheduler = Scheduler(Lent(model, engine), store=store, others=said)
        ended, failures = threading.Semaphore(0), []

        def listen(fails):
            def on_event(event):
                if isinstance(event, Failure):
                    failures.append(event.error)
                    ended.release()
                elif isinstance(event, GeneratedToken):
                    if fails:
                        raise BufferError("nobody reads")
                    if event.finish_reason:
                        ended.release()

            return on_event

        requests = [
            (tokens, {}),
            ([*tokens, 7, 8, 9], {}),
            (tokens[:40], {"constraint": Barred(model.args.vocab_size, 30)}),
            (tokens[:30], {"constraint": Barred(model.args.vocab_size, 5)}),
            (tokens[:20], {"scores_prompt": True, "top_logprobs": 1}),
            (tokens[:10], {"fails": True}),
        ]
        for given, more in requests:
            on_event = listen(more.pop("fails", False))
            options = Options(max_tokens=20, temp=1.0)
            scheduler.submit(GenerationRequest(given, options, **more), on_event)
            time.sleep(0.02)
        cancelled = scheduler.submit(
            GenerationRequest(tokens[:50], Options(max_tokens=400)), listen(False)
        )
        for _ in requests:
            assert ended.acquire(timeout=60)
        cancelled.cancel()
        again = GenerationRequest([*tokens, 5], Options(max_tokens=5))
        scheduler.submit(again, listen(False))
        assert ended.acquire(timeout=60)
        scheduler.close()
        assert said.error is None
        assert sorted(map(str, failures)) == ["it is over", "nobody reads"]
        return said.lines

    def followed(self, model, engine, lines, store=None):
        left = iter(lines)
        follow(model, engine.tokenizer, None, store, lambda: next(left))
        assert list(left) == []

    @pytest.mark.parametrize("batches", [1, 2])
    def test_all_ranks_make_the_same_calls(self, model, engine, calls, monkeypatch, batches):
        """Texts are in two batches where ranks have some layers each."""
        monkeypatch.setattr(microbatches, "turns_of", lambda model: batches)
        lines = self.lead(model, engine, engine.prompt_store(1 << 24))
        made = calls[:]
        calls.clear()
        assert any(json.loads(line).get("cached", 0) > 100 for line in lines[:-1])
        self.followed(model, engine, lines, engine.prompt_store(1 << 24))
        assert calls == made and len(made) > 20

    @pytest.mark.parametrize(
        ("said", "instead"),
        [(r'"gone": \[[^]]+\]', '"gone": []'), ('"chunk": true', '"chunk": false')],
    )
    def test_what_is_not_followed_shows_in_the_calls(self, model, engine, calls, said, instead):
        """The control of the test above."""
        lines = [re.sub(said, instead, line) for line in self.lead(model, engine, None)]
        made = calls[:]
        calls.clear()
        with contextlib.suppress(StopIteration, KeyError, IndexError, AssertionError):
            self.followed(model, engine, lines)
        assert calls != made

    def test_steps_of_constrained_texts_are_on_their_way_together(
        self, model, engine, calls, monkeypatch
    ):
        """None waits until what another text's constraint allows is known."""

        class Noted(Barred):
            def allowed(self):
                calls.append("allowed")
                return super().allowed()

        monkeypatch.setattr(microbatches, "turns_of", lambda model: 2)
        scheduler, ended = Scheduler(Lent(model, engine), others=Said()), threading.Semaphore(0)

        def on_event(event):
            if isinstance(event, GeneratedToken) and event.finish_reason:
                ended.release()

        with scheduler._changed:  # both are there when it begins
            for token in (5, 300):
                constraint = Noted(model.args.vocab_size, 9)
                options = Options(max_tokens=4, temp=1.0)
                scheduler.submit(
                    GenerationRequest([token], options, constraint=constraint), on_event
                )
        assert ended.acquire(timeout=60) and ended.acquire(timeout=60)
        scheduler.close()
        made = "".join("." if call == "allowed" else "x" for call in calls)
        assert made == "x." + 3 * "xx.." + "x."

    def test_a_store_that_keeps_other_things_is_noticed(self, model, engine):
        lines = self.lead(model, engine, engine.prompt_store(1 << 24))
        with pytest.raises(RuntimeError, match=r"begins with \d+ that rank 0 has kept, and 0 here"):
            self.followed(model, engine, lines)

    def test_an_error_of_the_model_ends_all_ranks(self, model, engine, monkeypatch):
        def fails(self, tokens, cache=None):
            raise RuntimeError("out of paper")

        monkeypatch.setattr(type(model), "states", fails)
        said, failed = Said(), threading.Event()
        scheduler = Scheduler(Lent(model, engine), others=said)
        scheduler.submit(
            GenerationRequest([1, 2, 3], Options(max_tokens=5)), lambda e: failed.set()
        )
        assert failed.wait(60)
        scheduler.close()
        assert str(said.error) == "out of paper"
        assert said.lines[-1] == "end"


class Lent:
    """An engine whose model is another one's."""

    def __init__(self, model, engine):
        self.model, self.tokenizer, self.drafts = model, engine.tokenizer, None
