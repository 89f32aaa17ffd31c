"""Agents of others against the server: several turns with tools, over each of its three APIs.

The bundled model is far too small to want a tool, so the first step of each turn has to call one,
which a grammar sees to; what it then says of the result is its own.
"""

import asyncio
from typing import Literal

import agents
import anthropic
import openai
import pytest
from agents.memory import SQLiteSession
from pydantic import BaseModel

MODELS = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
Town = Literal["Oslo", "Rome", "Lima"]
Day = Literal[0, 1, 7]  # the bundled model does not end a number that may be of any length
REPORT = "def warm(town, day):\n    return {degrees}\n"


def weather(town: Town, day: Day) -> str:
    """The weather in a town.

    Args:
        town: where.
        day: how many days from now.
    """
    return REPORT.format(degrees=len(town) + day % 7)


class Report(BaseModel):
    """What an agent says in the end, which the bundled model would not come to by itself."""

    warm: bool
    kind: Literal["sun", "rain"]


class Weather:
    """A tool that keeps what it was called with, and is there once for each question."""

    def __init__(self):
        self.calls, self.wanted = [], 1

    def tool(self):
        def get_weather(town: Town, day: Day) -> str:
            self.calls.append((town, day))
            return weather(town, day)

        get_weather.__doc__ = weather.__doc__
        return agents.function_tool(
            get_weather, is_enabled=lambda context, agent: len(self.calls) < self.wanted
        )

    def check(self, count):
        assert len(self.calls) == count
        for town, day in self.calls:
            assert town in ("Oslo", "Rome", "Lima") and day in (0, 1, 7)


def outputs(items):
    """The results of tools among an agent's items."""
    return [item.output for item in items if item.type == "tool_call_output_item"]


def agent(client, api, tools):
    settings = agents.ModelSettings(
        tool_choice="required",
        max_tokens=300,
        temperature=0,
        parallel_tool_calls=False,
        include_usage=True,
    )
    model = MODELS[api](model="demo", openai_client=client)
    return agents.Agent(
        "Coder",
        instructions="# Weather.\n",
        tools=tools,
        model=model,
        model_settings=settings,
        output_type=Report,
    )


@pytest.mark.parametrize(
    ("api", "stream"),
    [
        ("chat", True),
        ("responses", False),
        pytest.param("chat", False, marks=pytest.mark.slow),
        pytest.param("responses", True, marks=pytest.mark.slow),
    ],
)
def test_openais_agent_uses_tools_for_several_turns(server, api, stream):
    used = Weather()
    quiet = agents.RunConfig(tracing_disabled=True)

    async def talk():
        session, answers = SQLiteSession("talk"), []
        base = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**base) as client:
            coder = agent(client, api, [used.tool()])
            for question in ("How warm is it?\n", "And tomorrow?\n", "And then?\n"):
                given = {"session": session, "run_config": quiet, "max_turns": 3}
                if stream:
                    answer = agents.Runner.run_streamed(coder, question, **given)
                    events = [event async for event in answer.stream_events()]
                    assert any(event.type == "raw_response_event" for event in events)
                else:
                    answer = await agents.Runner.run(coder, question, **given)
                answers.append(answer)
                used.wanted += 1
            return answers, await session.get_items()

    answers, items = asyncio.run(talk())
    used.check(3)
    for answer, call in zip(answers, used.calls, strict=True):
        assert outputs(answer.new_items) == [weather(*call)]
        assert isinstance(answer.final_output, Report)
        assert len(answer.raw_responses) == 2
    sizes = [answer.raw_responses[0].usage.input_tokens for answer in answers]
    assert sizes == sorted(set(sizes))  # each turn has all that came before
    assert sum(item.get("role") == "user" for item in items) == 3


def test_an_agent_hands_over_to_another(server):
    async def talk():
        base = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**base) as client:
            first, second = agent(client, "responses", []), agent(client, "responses", [])
            second.name, second.model_settings = "Other", agents.ModelSettings(max_tokens=300)
            first.handoffs = [second]
            quiet = agents.RunConfig(tracing_disabled=True)
            return await agents.Runner.run(first, "import os\n", run_config=quiet, max_turns=3)

    answer = asyncio.run(talk())
    assert answer.last_agent.name == "Other"
    assert len(answer.raw_responses) == 2 and isinstance(answer.final_output, Report)


def test_anthropics_runner_of_tools(server):
    used = Weather()

    @anthropic.beta_tool
    def get_weather(town: Town, day: Day) -> str:
        """The weather in a town.

        Args:
            town: where.
            day: how many days from now.
        """
        used.calls.append((town, day))
        return weather(town, day)

    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            model="demo",
            max_tokens=300,
            tools=[get_weather],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            messages=[{"role": "user", "content": "How warm is it?\n"}],
            max_iterations=4,
        )
        messages = list(runner)
    assert [message.stop_reason for message in messages] == ["tool_use"] * 4
    assert len({message.content[-1].id for message in messages}) == 4
    used.check(len(used.calls))
    assert len(used.calls) >= 3
    sizes = [m.usage.input_tokens + m.usage.cache_read_input_tokens for m in messages]
    assert sizes == sorted(set(sizes))
