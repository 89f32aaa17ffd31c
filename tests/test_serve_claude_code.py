"""Claude Code itself, which comes with claude-agent-sdk, has a conversation with a tool.

The bundled model is far too small to want a tool, so a grammar has it call one after each question
and then say something short. Claude Code is told of neither.
"""

import asyncio
import json
from dataclasses import replace

import pytest
from served import served

from glm_fused import Engine, EngineOptions
from glm_fused.serve import anthropic_messages

sdk = pytest.importorskip("claude_agent_sdk", reason="needs glm-fused[claude]")
pytestmark = pytest.mark.slow

QUESTIONS = ("How warm is it?", "And tomorrow?", "And then?")
TOWNS, DAYS = ("Oslo", "Rome", "Lima"), (0, 1, 7)
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": list(TOWNS)}, "day": {"enum": list(DAYS)}},
    "required": ["town", "day"],
    "additionalProperties": False,
}
SAID = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}},
    "required": ["warm"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "said", "schema": SAID}}


@pytest.fixture
def turns(monkeypatch):
    """The conversations as the server reads them, each of which a grammar has answered."""
    found, real = [], anthropic_messages.turn_of

    def constrained(body):
        turn = real(body)
        found.append(turn)
        if turn.messages[-1]["role"] == "tool":
            return replace(turn, tool_choice="none", response_format=FORM)
        return replace(turn, tool_choice="required", parallel=False)

    monkeypatch.setattr(anthropic_messages, "turn_of", constrained)
    return found


@pytest.fixture
def server():
    options = EngineOptions(prompt_cache="256MiB")
    with Engine("demo", options) as engine, served(engine) as server:
        yield server


def options_of(server, folder, tool):
    """Claude Code's, with one tool of ours and none of its own, in a home of its own."""
    tools = sdk.create_sdk_mcp_server("weather", tools=[tool])
    return sdk.ClaudeAgentOptions(
        model="demo",
        system_prompt="Be brief.",
        tools=[],
        mcp_servers={"weather": tools},
        strict_mcp_config=True,
        allowed_tools=["mcp__weather__get_weather"],
        setting_sources=[],
        cwd=folder,
        extra_args={"bare": None},  # else prompts are longer than the model's context
        env={
            "HOME": str(folder),
            "CLAUDE_CONFIG_DIR": str(folder / "claude"),
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": "",
            "ANTHROPIC_API_KEY": "none",
            "ANTHROPIC_MODEL": "demo",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "demo",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
    )


def test_claude_code_uses_a_tool_for_several_turns(server, turns, tmp_path):
    calls = []

    @sdk.tool("get_weather", "The weather in a town.", SCHEMA)
    async def get_weather(given):
        calls.append((given["town"], given["day"]))
        return {"content": [{"type": "text", "text": f"{len(calls)} degrees"}]}

    async def talk():
        ended = []
        async with sdk.ClaudeSDKClient(options_of(server, tmp_path, get_weather)) as client:
            for question in QUESTIONS:
                await client.query(question)
                async for message in client.receive_response():
                    if isinstance(message, sdk.ResultMessage):
                        ended.append(message)
        return ended

    ended = asyncio.run(asyncio.wait_for(talk(), 500))
    assert [(end.is_error, end.num_turns) for end in ended] == [(False, 2)] * 3, ended
    for end in ended:
        assert json.loads(end.result).keys() == {"warm"}
    assert len(calls) == 3 and all(town in TOWNS and day in DAYS for town, day in calls)
    assert len(turns) == 6
    assert [turn.messages[-1]["role"] for turn in turns] == ["user", "tool"] * 3
    results = [m["content"] for m in turns[-1].messages if m["role"] == "tool"]
    assert results == ["1 degrees", "2 degrees", "3 degrees"]
    asked = [json.dumps(m["content"]) for m in turns[-1].messages if m["role"] == "user"]
    for question in QUESTIONS:
        assert sum(question in text for text in asked) == 1
    numbers = server.service.activity.describe()["totals"]
    assert numbers["requests"] == 6
    assert numbers["prompt"] / 2 < numbers["cached"] < numbers["prompt"]  # a turn takes what is new
