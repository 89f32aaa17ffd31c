"""What a scheduler tells of requests reaches their client in order, together and counted."""

import asyncio
import random

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from glm_fused.generation.batching.jobs import Job
from glm_fused.generation.batching.requests import (
    GeneratedToken,
    GenerationRequest,
    PromptProgress,
)
from glm_fused.generation.options import Options
from glm_fused.serve.errors import ApiError
from glm_fused.serve.metrics import _TOKEN_SECONDS, Metrics
from glm_fused.serve.running import MOST_JOINED, Running
from glm_fused.serve.streams import MOST_AT_ONCE, EventStream

PROGRESS = PromptProgress(3, 9, 0)
NAME = "glm_fused_token_seconds"


class Asked:
    """A `Running` for so many texts, its metrics, and what `submit` was given."""

    def __init__(self, count):
        self.metrics, self.receive, self.jobs = Metrics(dict), [], []
        requests = [GenerationRequest([1, 2, 3], Options(9))] * count
        self.running = Running(requests, self.submit, 100, self.metrics)

    def submit(self, request, receive):
        self.receive.append(receive)
        self.jobs.append(Job(request, receive))
        return self.jobs[-1]

    def counted(self, name):
        (value,) = (
            float(line.split()[-1])
            for line in self.metrics.text().decode().splitlines()
            if line.startswith(f"glm_fused_{name} ")
        )
        return value

    @property
    def generated(self):
        return [usage.generated for usage in self.running.usage]


def run(main):
    return asyncio.run(main())


def tokens(*texts, ends=None):
    """Tokens with these texts, the last with a reason."""
    found = [GeneratedToken(i, text, None) for i, text in enumerate(texts)]
    return [*found[:-1], found[-1]._replace(finish_reason=ends)]


def test_what_is_at_hand_for_a_text_comes_together():
    async def main():
        asked = Asked(2)
        asked.receive[0]([PROGRESS, *tokens("a", "b")])
        asked.receive[1](tokens("c"))
        asked.receive[1](tokens("d", "e"))
        asked.receive[0](tokens(*"f" * MOST_JOINED, "g", ends="length"))
        asked.receive[1](tokens("h", ends="stop"))
        found = []
        async for index, given in asked.running:
            found.append((index, given if given is PROGRESS else "".join(t.text for t in given)))
        assert found == [
            (0, PROGRESS),
            (0, "ab"),
            (1, "cde"),
            (0, "f" * MOST_JOINED),
            (0, "g"),
            (1, "h"),
        ]
        assert asked.generated == [3 + MOST_JOINED, 4]
        assert asked.counted("generated_tokens_total") == 7 + MOST_JOINED
        assert asked.counted("first_token_seconds_count") == 2
        assert asked.counted("token_seconds_count") == 5 + MOST_JOINED

    run(main)


def test_times_are_even_within_what_came_together(monkeypatch):
    """Their sum is the time from the first token to the last."""
    now = iter([0.0, 10.0, 14.0, 15.0])
    monkeypatch.setattr("glm_fused.serve.running.time.perf_counter", lambda: next(now))

    async def main():
        asked = Asked(1)
        for given in (tokens("a"), tokens("b", "c", "d", "e"), tokens("f", ends="stop")):
            asked.receive[0](given)
            await anext(asked.running)
        with pytest.raises(StopAsyncIteration):
            await anext(asked.running)
        assert asked.counted("first_token_seconds_sum") == 10
        assert asked.counted("token_seconds_sum") == 5
        assert 'token_seconds_bucket{le="1.0"} 5.0' in asked.metrics.text().decode()

    run(main)


@pytest.mark.parametrize("ends", [None, "length"])
def test_an_answer_that_ends_within_what_came_together_counts_what_it_took(ends):
    async def main():
        asked = Asked(2)
        asked.receive[0](tokens(*"abcde", ends=ends))
        index, given = await anext(asked.running)
        assert len(given) == 5
        asked.running.end(index, 2)
        asked.receive[0](tokens("f"))  # on its way
        asked.receive[1](tokens("g", ends="stop"))
        assert [index async for index, _ in asked.running] == [1]
        assert asked.generated == [3, 1]
        assert [job.over for job in asked.jobs] == [True, False]
        assert asked.counted('answers_total{reason="stop"}') == 2

    run(main)


def test_what_was_given_counts_where_its_client_goes_away():
    async def main():
        asked = Asked(1)
        asked.receive[0](tokens(*"abc"))
        await anext(asked.running)
        assert asked.generated == [0]
        asked.running.cancel()
        asked.running.cancel()
        assert asked.generated == [3] and asked.jobs[0].over
        with pytest.raises(StopAsyncIteration):
            await anext(asked.running)

    run(main)


@pytest.mark.parametrize("first_ends", [False, True])
def test_a_failure_comes_after_what_is_there_and_ends_all(first_ends):
    """Also where one of the texts ends before."""

    async def main():
        asked, found = Asked(2), []
        asked.receive[0](tokens("a", "b", ends="stop" if first_ends else None))
        asked.running.fail(ApiError(503, "no"))
        with pytest.raises(ApiError, match="no"):
            async for _, given in asked.running:
                found.append([token.text for token in given])
        assert found == [["a", "b"]] and all(job.over for job in asked.jobs)

    asyncio.run(asyncio.wait_for(main(), 20))


def pieces_of(groups):
    """The pieces in which a stream sends the events of each group, which are there at once."""
    sent = []

    async def main():
        asked = Asked(1)

        async def events():
            async for _, given in asked.running:
                for token in given:
                    yield token.text

        async def send(message):
            if message.get("body"):
                sent[-1].append(message["body"].decode())

        response = EventStream("/v1/completions", asked.running, events())
        work = asyncio.ensure_future(response.stream_response(send))
        for texts in groups:
            await asyncio.sleep(0.01)
            sent.append([])
            for text in texts:
                asked.receive[0](tokens(text, ends="stop" if text == "end" else None))
        await work

    run(main)
    return sent


GROUPS = [["a"], ["b", "c", "d"], ["e"], ["f", "end"]]


def test_events_that_are_there_at_once_go_in_one_piece():
    assert pieces_of(GROUPS) == [["".join(texts)] for texts in GROUPS]
    every = [str(i) for i in range(MOST_AT_ONCE + 1)]
    assert pieces_of([every, ["end"]]) == [["".join(every[:-1]), every[-1]], ["end"]]


def test_a_stream_that_did_not_send_before_it_waits_is_noticed(monkeypatch):
    deaf = property(lambda self: None, lambda self, send: None)
    monkeypatch.setattr(Running, "before_wait", deaf, raising=False)
    assert pieces_of(GROUPS) != [["".join(texts)] for texts in GROUPS]


def test_times_that_come_together_are_a_histogram_as_others_make_it():
    registry, draw = CollectorRegistry(), random.Random(1)
    help = "Time between a text's tokens."
    single = Histogram(NAME, help, buckets=_TOKEN_SECONDS, registry=registry)
    metrics = Metrics(dict)
    for _ in range(200):
        count = draw.randint(1, 9)
        seconds = draw.choice([0.0005 * count, draw.uniform(0, 20) * 10 ** -draw.randint(0, 4)])
        metrics.next_tokens(count, seconds)
        for _ in range(count):
            single.observe(seconds / count)
    found, expected = (
        [line for line in text.decode().splitlines() if f"{NAME}_" in line and "_cr" not in line]
        for text in (metrics.text(), generate_latest(registry))
    )
    *buckets, total = found
    *expected_buckets, expected_total = expected
    assert buckets == expected_buckets and len(buckets) == len(_TOKEN_SECONDS) + 2
    assert float(total.split()[1]) == pytest.approx(float(expected_total.split()[1]))
