"""Tokens that come together make the answer that they make one by one, in fewer pieces."""

import asyncio
import json
import random
import re
from itertools import chain
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from test_answers import THINK, TOOLS
from test_running import Asked

from glm_fused.generation.batching.requests import GeneratedToken
from glm_fused.generation.options import Options
from glm_fused.serve.answering import Answering
from glm_fused.serve.answers import (
    AnswerParser,
    Reasoning,
    Text,
    ToolArguments,
    ToolCallStart,
    joined,
)
from glm_fused.serve.openai_answer import ChatAnswer
from glm_fused.serve.tools import call_text

SAID = "I see.</think>Well, é. " + call_text("weather", {"days": 2, "city": "Oslo"})
TWICE = SAID + call_text("stop", {}) + "<think>more</think>end"
NAMES = SimpleNamespace(chat=lambda token: {"token": token.token}, ends=lambda token: False)


def tokens_of(text, draw):
    """The text in tokens of up to five characters; the last has the reason."""
    tokens = []
    while text:
        size = draw.randint(0, 5)
        tokens.append(GeneratedToken(len(tokens), text[:size], None))
        text = text[size:]
    return [*tokens[:-1], tokens[-1]._replace(finish_reason="length")]


def groups_of(tokens, draw):
    """All tokens, in groups by chance."""
    found = []
    while tokens:
        size = draw.choice([1, 2, 9, len(tokens)])
        found.append(tokens[:size])
        tokens = tokens[size:]
    return found


def parser():
    return AnswerParser(TOOLS, THINK, opened=True)


def without_ids(message):
    """The same, but for what is drawn."""
    return json.loads(re.sub(r"call_\w{24}", "id", json.dumps(message)))


def chat(groups, parallel, names=None):
    """An answer of chat/completions, its pieces group by group, and how many tokens it took."""
    answer, pieces, taken = ChatAnswer(parser(), parallel, names), [], 0
    for group in groups:
        pieces.append(answer.feed(group))
        taken += len(group) - answer.unused
        if answer.ended:
            break
    return answer, pieces, taken


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("text", [SAID, TWICE])
@pytest.mark.parametrize("names", [None, NAMES])
def test_chat_answers_are_the_same(text, parallel, names):
    """Also where the second call, within a group, ends the answer; what follows is not taken."""
    for seed in range(60):
        draw = random.Random(seed)
        tokens = tokens_of(text, draw)
        single, pieces, taken = chat([[token] for token in tokens], parallel, names)
        grouped, fewer, took = chat(groups_of(tokens, draw), parallel, names)
        assert without_ids(grouped.choice()) == without_ids(single.choice()), seed
        assert grouped.reasoning_tokens == single.reasoning_tokens
        assert (took, grouped.ended) == (taken, True)
        assert (took < len(tokens)) == (text is TWICE and not parallel)
        if names is None:
            for group in fewer:
                kinds = [[*piece["delta"]] for piece in group]
                said = [kind for kind in kinds if kind and kind != ["tool_calls"]]
                assert len(said) <= 5
            assert sum(map(len, fewer)) <= sum(map(len, pieces))
        else:
            assert without_ids([*chain(*fewer)]) == without_ids([*chain(*pieces)])


def message(groups, parallel, apart):
    """What an `Answering` makes of tokens: its progress, itself, and its `Asked`."""

    async def main():
        asked = Asked(1)
        service = SimpleNamespace(start=lambda requests: asked.running)
        prepared = SimpleNamespace(parser=parser(), tokens=[1], constraint=None)
        answering = Answering(service, prepared, Options(9), parallel, 0 if apart else None)
        found = []
        asked.receive[0](groups[0])

        async def read():
            async for progress in answering.progress():
                found.append(progress)
                if len(groups) > 1:
                    await asyncio.sleep(0)

        work = asyncio.ensure_future(read())
        for group in groups[1:]:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asked.receive[0](group)
        await asyncio.wait_for(work, 20)
        return found, answering, asked

    return asyncio.run(main())


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_messages_are_the_same(parallel, apart):
    """With log-probabilities each token stays apart; what is counted is the same."""
    for seed in range(30):
        draw = random.Random(seed)
        tokens = tokens_of(TWICE, draw)
        expected, single, _ = message([[token] for token in tokens], parallel, True)
        found, answering, asked = message(groups_of(tokens, draw), parallel, apart)
        assert deltas(found) == deltas(expected), seed
        assert answering.counts() == single.counts()
        assert (answering.reason, answering.calls) == (single.reason, single.calls)
        assert asked.jobs[0].over is not parallel  # which a test's requests are not by themselves
        assert sum(len(progress.tokens) for progress in found) == answering.counts()["generated"]
        if apart:
            assert [len(progress.tokens) for progress in found] == [1] * len(found)


def deltas(found):
    """All that some progress says, in runs, without what is drawn."""
    said = joined([delta for progress in found for delta in progress.deltas])
    return [one.name if isinstance(one, ToolCallStart) else one for one in said]


def test_only_runs_of_one_kind_are_joined():
    start, other = ToolCallStart(0, "a", "f"), ToolCallStart(1, "b", "g")
    given = [Text("a"), Text("b"), Reasoning("c"), Reasoning("d"), Text("e"), start]
    given += [ToolArguments(0, "{"), ToolArguments(0, "}"), ToolArguments(1, "{}"), other]
    assert joined(given) == [
        Text("ab"),
        Reasoning("cd"),
        Text("e"),
        start,
        ToolArguments(0, "{}"),
        ToolArguments(1, "{}"),
        other,
    ]
    assert joined([]) == []
