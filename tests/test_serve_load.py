"""Many clients at once: nothing is lost, memory returns, and every answer is what it is alone."""

import gc
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import anthropic
import mlx.core as mx
import openai
import pytest
from served import served

PROMPTS = [
    "def add(a, b):\n", "class Stack:\n    def push(self, item):\n", "import", "x",
    "for i in range(10):\n    print(i)\n" * 5, "# é😀\n", "try:\n    pass\nexcept", "\n\n\n",
]  # fmt: skip
CLIENTS = 8
KINDS = ["chat", "tool", "schema", "completion", "response", "message", "message tool"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def cases(count, seed):
    """Requests of all kinds, drawn from a seed: kind, prompt and options, and how to ask."""
    draw = random.Random(seed)
    for _ in range(count):
        kind, options = draw.choice(["chat", *KINDS]), {}
        options["max_tokens"] = draw.choice([1, 2, 5, 12, 23])
        if draw.random() < 0.5 and not kind.startswith("message"):
            options |= {"temperature": draw.choice([0.5, 1.0, 1.7]), "seed": draw.randrange(3)}
        if draw.random() < 0.3 and kind == "chat":
            options["stop"] = draw.choice(["\n", "self", "e"])
        if draw.random() < 0.3 and kind == "chat":
            options |= {"logprobs": True, "top_logprobs": draw.randrange(3)}
        how = draw.choices(["whole", "stream", "leave"], [5, 5, 1])[0]
        yield (kind, draw.choice(PROMPTS), json.dumps(options)), how


class Clients:
    """Official clients of a server; a context manager."""

    def __init__(self, url):
        common = {"api_key": "-", "max_retries": 0, "timeout": 600}
        self.openai = openai.OpenAI(base_url=f"{url}/v1", **common)
        self.anthropic = anthropic.Anthropic(base_url=url, **common)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.openai.close()
        self.anthropic.close()

    def ask(self, case, how):
        """All that an answer says, or None where the client leaves in its midst."""
        kind, prompt, options = case
        messages = [{"role": "user", "content": prompt}]
        fields = {"model": "demo", "messages": messages} | json.loads(options)
        if kind.startswith("message"):
            return self._message(fields, how, kind.endswith("tool"))
        if kind == "response":
            most = fields.pop("max_tokens")
            fields |= {"input": fields.pop("messages"), "max_output_tokens": most}
            fields = {name: value for name, value in fields.items() if name != "seed"}
            fields["temperature"] = 0
            return self._response(fields, how)
        if kind == "completion":
            fields |= {"prompt": fields.pop("messages")[0]["content"]}
            return self._choices(self.openai.completions.create, fields, how)
        if kind == "tool":
            function = {"name": "weather", "parameters": PARAMETERS, "strict": True}
            fields |= {"tools": [{"type": "function", "function": function}]}
            fields |= {"tool_choice": "required", "max_tokens": 100}
        if kind == "schema":
            form = {"name": "weather", "schema": PARAMETERS}
            fields |= {"response_format": {"type": "json_schema", "json_schema": form}}
            fields |= {"max_tokens": 100}
        return self._choices(self.openai.chat.completions.create, fields, how)

    def _choices(self, create, fields, how):
        if how == "whole":
            answer = create(**fields)
            pieces = [answer.choices[0]]
        else:
            stream = create(**fields, stream=True, stream_options={"include_usage": True})
            if how == "leave":
                next(stream)
                return stream.close()
            chunks = list(stream)
            answer = chunks[-1]
            pieces = [chunk.choices[0] for chunk in chunks[:-1]]
        return joined(pieces), pieces[-1].finish_reason, answer.usage.completion_tokens

    def _response(self, fields, how):
        if how == "whole":
            answer = self.openai.responses.create(**fields)
        else:
            with self.openai.responses.stream(**fields) as stream:
                if how == "leave":
                    return next(iter(stream)) and None
                answer = list(stream)[-1].response
        return answer.output_text, answer.status, answer.usage.output_tokens

    def _message(self, fields, how, tool):
        if tool:
            fields |= {"tools": [{"name": "weather", "input_schema": PARAMETERS}]}
            fields |= {"tool_choice": {"type": "any"}, "max_tokens": 100}
        if how == "whole":
            answer = self.anthropic.messages.create(**fields)
        else:
            with self.anthropic.messages.stream(**fields) as stream:
                if how == "leave":
                    return next(iter(stream)) and None
                answer = stream.get_final_message()
        blocks = [
            block.text if block.type == "text" else (block.name, block.input)
            for block in answer.content
        ]
        return blocks, answer.stop_reason, answer.usage.output_tokens


def joined(pieces):
    """Text, calls and log-probabilities of a whole choice, or of those of a stream's chunks."""
    text, calls, logprobs = "", [], []
    for piece in pieces:
        said = getattr(piece, "message", None) or getattr(piece, "delta", None)
        text += piece.text if said is None else said.content or ""
        for call in getattr(said, "tool_calls", None) or ():
            name, arguments = call.function.name, call.function.arguments
            if name:
                calls.append([name, ""])
            calls[-1][1] += arguments
        if piece.logprobs is not None:
            logprobs += [entry.model_dump() for entry in piece.logprobs.content]
    return text, calls, logprobs


def of_the_engine(engine, kind, prompt, options):
    """Text, reason and number of tokens as the model alone has them, of what has no schema."""
    names = {"temperature": "temp"}
    given = {names.get(name, name): value for name, value in json.loads(options).items()}
    given = {k: v for k, v in given.items() if "logprobs" not in k}
    asked = prompt if kind == "completion" else [{"role": "user", "content": prompt}]
    found = engine.generate(asked, raw=kind == "completion", **given)
    return found.text, found.finish_reason, len(found.tokens)


def memory(engine):
    """The bytes that MLX holds, without recorded steps, of which there are some for each shape."""
    steps = engine.model._steps
    steps._last = {}
    if steps._parts is not None:
        steps._parts.steps = {}
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def held(engine, server):
    """What a server has while nobody asks: bytes of MLX, open files, and requests."""
    server.idle()
    return memory(engine), open_files(), len(server.service._running)


def run(engine, count, seed):
    """Ask ``count`` times from several threads, and check all that comes and stays."""
    asked = list(cases(count, seed))
    with served(engine) as server, ExitStack() as open_clients:
        with Clients(server.url) as client:
            alone = {case: client.ask(case, "whole") for case, _ in asked}
        for case, answer in alone.items():
            if case[0] in ("chat", "completion"):
                assert (answer[0][0], *answer[1:]) == of_the_engine(engine, *case), case
        before = held(engine, server)
        clients = [open_clients.enter_context(Clients(server.url)) for _ in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            work = [pool.submit(clients[i % CLIENTS].ask, *each) for i, each in enumerate(asked)]
            answers = [each.result() for each in work]
        open_clients.close()
        end = time.monotonic() + 10  # by when it has noticed that they closed their connections
        while open_files() > before[1] and time.monotonic() < end:
            time.sleep(0.01)
        after = held(engine, server)
        described = server.service.scheduler.describe()
    for (case, how), answer in zip(asked, answers, strict=True):
        assert answer == (None if how == "leave" else alone[case]), (case, how)
    assert after[0] - before[0] < 1 << 20
    assert after[1:] == before[1:] == (before[1], 0)
    assert described["failed"] == described["memory"]["caches"] == 0
    return len(alone)


def test_some_requests(engine):
    assert run(engine, 24, seed=1) > 15


@pytest.mark.slow
def test_five_hundred_requests(engine):
    assert run(engine, 500, seed=2) > 150
