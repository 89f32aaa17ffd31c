"""Many clients at once: nothing is lost, memory returns, and every text is what it is alone."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import openai
import pytest
from served import served

PROMPTS = [
    "def add(a, b):\n", "class Stack:\n    def push(self, item):\n", "import", "x",
    "for i in range(10):\n    print(i)\n" * 5, "# é😀\n", "try:\n    pass\nexcept", "\n\n\n",
]  # fmt: skip
CLIENTS = 8


def cases(count, seed):
    """Requests of all kinds, drawn from a seed: prompt, options and whether to stream."""
    draw = random.Random(seed)
    for _ in range(count):
        options = {"max_tokens": draw.choice([1, 2, 5, 12, 23])}
        if draw.random() < 0.5:
            options |= {"temperature": draw.choice([0.5, 1.0, 1.7]), "seed": draw.randrange(3)}
        if draw.random() < 0.3:
            options["stop"] = draw.choice(["\n", "self", "e"])
        yield draw.choice(PROMPTS), options, draw.random() < 0.5


def expected(engine, prompt, options):
    names = {"temperature": "temp"}
    given = {names.get(name, name): value for name, value in options.items()}
    found = engine.generate([{"role": "user", "content": prompt}], **given)
    return found.text, found.finish_reason, len(found.tokens)


def ask(client, prompt, options, stream):
    messages = [{"role": "user", "content": prompt}]
    given = {"model": "demo", "messages": messages, "stream": stream} | options
    if not stream:
        answer = client.chat.completions.create(**given)
        choice = answer.choices[0]
        return choice.message.content, choice.finish_reason, answer.usage.completion_tokens
    chunks = list(client.chat.completions.create(**given, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return text, chunks[-2].choices[0].finish_reason, chunks[-1].usage.completion_tokens


def memory(engine):
    """The bytes that MLX holds, without recorded steps, of which there are some for each shape."""
    steps = engine.model._steps
    steps._last = {}
    if steps._parts is not None:
        steps._parts.steps = {}
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def run(engine, count, seed):
    """Ask ``count`` times from several threads; returns how much memory stayed."""
    asked = list(cases(count, seed))
    keys = {repr(case[:2]): case[:2] for case in asked}
    alone = {key: expected(engine, *case) for key, case in keys.items()}
    with served(engine) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=300) as client:
            ask(client, *asked[0])
            before = memory(engine)
            with ThreadPoolExecutor(CLIENTS) as pool:
                answers = list(pool.map(lambda case: ask(client, *case), asked))
            left = memory(engine) - before
        server.idle()
    for case, answer in zip(asked, answers, strict=True):
        assert answer == alone[repr(case[:2])], case
    return left


def test_forty_requests(engine):
    assert run(engine, 40, seed=1) < 1 << 20


@pytest.mark.slow
def test_five_hundred_requests(engine):
    assert run(engine, 500, seed=2) < 1 << 20
