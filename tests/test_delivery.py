"""Events go from the scheduler's thread to the event loop together, and none is held for long."""

import asyncio
import random

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from glm_fused.generation.batching.requests import Failure, GeneratedToken, PromptProgress
from glm_fused.serve import delivery as module
from glm_fused.serve.delivery import TOGETHER, Delivery

TOKEN, LAST = GeneratedToken(5, "x", None), GeneratedToken(5, "x", "stop")
PROGRESS, FAILURE = PromptProgress(3, 9, 0), Failure(ValueError("no"))


class Loop(asyncio.SelectorEventLoop):
    """Has a time that a test sets, and counts how often other threads wake it."""

    def __init__(self):
        super().__init__()
        self.now, self.woken = 1000.0, 0

    def time(self):
        return self.now

    def call_soon_threadsafe(self, *args, **options):
        self.woken += 1
        return super().call_soon_threadsafe(*args, **options)


class Texts:
    """Texts whose events are told in turns of a scheduler, and when each was received."""

    def __init__(self, loop, count):
        self.loop, self.got = loop, [[] for _ in range(count)]
        self.delivery = Delivery(loop.time)
        self.tell = [self.delivery.to(self.receiver(found)) for found in self.got]

    def receiver(self, found):
        return lambda events: found.append((self.loop.now, list(events)))

    async def wait(self, seconds):
        """Time passes, in steps of a millisecond at most."""
        end = self.loop.now + seconds
        while self.loop.now < end - 1e-9:
            self.loop.now = min(end, self.loop.now + 0.001)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def turn(self, seconds, events):
        """A turn of so many seconds, at the end of which these (text, event) are told."""
        await self.wait(seconds)
        for text, event in events:
            self.tell[text](event)
        self.delivery.flush()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def events(self, text):
        return [event for _, events in self.got[text] for event in events]


def with_texts(count, play):
    """What ``play(texts)`` returns in a loop of its own."""
    loop = Loop()

    async def main():
        return await play(Texts(loop, count))

    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


async def quick_steps(texts):
    """A hundred steps of 2.1 ms for four texts; returns how often the loop was woken."""
    for i in range(100):
        event = LAST if i == 99 else TOKEN
        await texts.turn(0.0021, [(text, event) for text in range(4)])
    assert [texts.events(text) for text in range(4)] == [[TOKEN] * 99 + [LAST]] * 4
    assert all(len(found) == texts.loop.woken for found in texts.got)
    return texts.loop.woken


def test_events_of_quick_steps_are_handed_over_together(monkeypatch):
    """After the first ones every nine steps, as a tenth would be too late, and the last."""
    assert with_texts(4, quick_steps) == 1 + 99 // 9
    monkeypatch.setattr(module, "TOGETHER", 0)  # the control
    assert with_texts(4, quick_steps) == 100


@pytest.mark.parametrize("seconds", [0.6 * TOGETHER, TOGETHER, 5 * TOGETHER])
def test_each_step_is_handed_over_where_the_next_may_be_too_late(seconds):
    async def play(texts):
        for i in range(20):
            await texts.turn(seconds, [(0, TOKEN)])
            assert len(texts.events(0)) == i + 1
        assert texts.loop.woken == 20

    with_texts(1, play)


@pytest.mark.parametrize("urgent", [TOKEN, LAST, PROGRESS, FAILURE])
def test_what_is_urgent_is_handed_over_at_once_with_all_that_waits(urgent):
    """A first token of another text, progress, and ends."""

    async def play(texts):
        await texts.turn(0.001, [(0, TOKEN)])
        await texts.turn(0.001, [(0, TOKEN)])
        assert len(texts.events(0)) == 1
        await texts.turn(0.001, [(0, TOKEN), (1, urgent)])
        assert (texts.events(0), texts.events(1)) == ([TOKEN] * 3, [urgent])
        assert texts.loop.woken == 2

    with_texts(2, play)


async def anything(texts):
    """Turns that take anything, tell anything, and pause; none may wait for more than `TOGETHER`.

    Also not where the scheduler has no turn at all for long, and in the end none any more.
    """
    draw = random.Random(seed := random.randrange(2**32))
    told = [[] for _ in texts.tell]
    for _ in range(300):
        seconds = draw.choice([0.0001, 0.001, 0.002, 0.005, 0.02, 0.3])
        kinds = [TOKEN] * 20 + [PROGRESS, LAST]
        events = [(i, draw.choice(kinds)) for i in range(len(told)) if draw.random() < 0.5]
        if events and draw.random() < 0.05:  # they are told, and then the turn is long
            texts.tell[events[0][0]](events[0][1])
            told[events[0][0]].append((texts.loop.now, events[0][1]))
            texts.delivery.flush()
            seconds, events = 0.5, []
        await texts.turn(seconds, events)
        for text, event in events:
            told[text].append((texts.loop.now, event))
    await texts.wait(1)
    for text, expected in enumerate(told):
        assert texts.events(text) == [event for _, event in expected], seed
        received = [at for at, events in texts.got[text] for _ in events]
        for (at, _), found in zip(expected, received, strict=True):
            assert found - at < TOGETHER + 0.0015, seed


def test_no_event_waits_for_long_whatever_the_scheduler_does():
    with_texts(3, anything)


def test_an_event_that_is_held_for_ever_is_noticed(monkeypatch):
    """As without the loop's own look: the scheduler holds a token, and has no further turn."""
    look = module._Inbox.look
    monkeypatch.setattr(module._Inbox, "look", lambda self, woken=True: woken and look(self))
    with pytest.raises(AssertionError):
        with_texts(3, anything)


def test_a_loop_at_rest_is_not_looked_after():
    async def play(texts):
        await texts.turn(0.001, [(0, TOKEN)])
        await texts.wait(3 * TOGETHER)
        assert not any(not handle.cancelled() for handle in texts.loop._scheduled)

    with_texts(1, play)


def test_a_loop_that_was_closed_holds_nobody_up():
    delivery = Delivery()
    loops = [asyncio.new_event_loop() for _ in range(2)]

    async def to(receive):
        return delivery.to(receive)

    found = []
    puts = [loop.run_until_complete(to(found.append)) for loop in loops]
    loops[0].close()
    for put in puts:
        put(TOKEN)
    delivery.flush()
    loops[1].run_until_complete(asyncio.sleep(0))
    assert found == [[TOKEN]]
    assert list(delivery._inboxes) == loops[1:]
    loops[1].close()
