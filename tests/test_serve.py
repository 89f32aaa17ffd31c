"""OpenAI's own client against the server: chat, completions and models, whole and streamed."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import openai
import pytest

CODE = "def fibonacci(n):\n"
CHAT = [{"role": "user", "content": CODE}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **options):
    given = {"model": "demo", "messages": CHAT, "max_tokens": 24} | options
    return client.chat.completions.create(**given)


def complete(client, **options):
    given = {"model": "demo", "prompt": CODE, "max_tokens": 24, "temperature": 0} | options
    return client.completions.create(**given)


def alone(engine, prompt, raw=True, **options):
    return engine.generate(prompt, raw=raw, **options)


def test_a_chat_is_answered_with_the_text_of_the_engine(client, engine):
    answer = chat(client)
    choice = answer.choices[0]
    expected = alone(engine, CHAT, max_tokens=24)
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.model == "demo" and answer.object == "chat.completion"


@pytest.mark.parametrize("prompt", ["x", "class Tree:\n    def", "é😀 = 1\n"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_a_stream_has_the_text_of_the_whole_answer(client, prompt, tokens):
    messages = [{"role": "user", "content": prompt}]
    whole = chat(client, messages=messages, max_tokens=tokens)
    options = {"include_usage": True}
    chunks = list(
        chat(client, messages=messages, max_tokens=tokens, stream=True, stream_options=options)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) <= {None}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_comes_in_pieces_and_ends_with_done(server):
    body = {"model": "demo", "messages": CHAT, "max_tokens": 200, "stream": True}
    status, headers, found = server.request("POST", "/v1/chat/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [line for line in found.decode().split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert len(events) >= 6
    assert "usage" not in json.loads(events[1].removeprefix("data: "))


@pytest.mark.parametrize(
    "prompt", [CODE, [5, 9, 200, 7], [CODE, "import os\n", "x"], [[5, 9], [7, 7, 7]]]
)
def test_completions_take_texts_and_tokens_one_or_several(client, engine, prompt):
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    answer = complete(client, prompt=prompt)
    expected = [alone(engine, p, max_tokens=24) for p in (prompt if several else [prompt])]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert answer.usage.prompt_tokens == sum(one.prompt_tokens for one in expected)
    assert answer.usage.completion_tokens == sum(len(one.tokens) for one in expected)


def test_completions_stream_several_texts(client):
    whole = complete(client, prompt=[CODE, "import os\n"], n=2, seed=7, temperature=1.0)
    texts = [""] * 4
    stream = complete(
        client, prompt=[CODE, "import os\n"], n=2, seed=7, temperature=1.0, stream=True
    )
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4


def test_completions_echo_the_prompt_and_have_16_tokens_unless_they_say(client, engine):
    plain = client.completions.create(model="demo", prompt=CODE, temperature=0)
    assert plain.usage.completion_tokens == 16 and plain.choices[0].finish_reason == "length"
    echoed = complete(client, max_tokens=16, echo=True)
    assert echoed.choices[0].text == CODE + plain.choices[0].text


def test_n_gives_as_many_answers_with_a_seed_the_same_again(client, engine):
    answers = [chat(client, n=3, seed=11, temperature=1.5) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2]
    assert answers[0].usage.prompt_tokens == chat(client).usage.prompt_tokens
    single = chat(client, seed=11, temperature=1.5).choices[0].message.content
    assert single == texts[0][0]
    assert single == alone(engine, CHAT, max_tokens=24, temp=1.5, seed=11).text
    assert chat(client, seed=12, temperature=1.5).choices[0].message.content != single


def test_a_stop_text_ends_the_answer_before_it(client, engine):
    text = alone(engine, CODE, max_tokens=60).text
    stop = text[20:23]
    for given in (stop, [stop], ["\0never", stop]):
        answer = complete(client, max_tokens=60, stop=given)
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    chunks = list(complete(client, max_tokens=60, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]


def reference_logprobs(engine, prompt, tokens):
    """Log-probabilities [l, vocabulary] of what followed the prompt, by one forward of all."""
    logits = engine.step(mx.array([[*prompt, *tokens]]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return logprobs[len(prompt) - 1 : -1]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_name_the_tokens_that_were_generated(client, engine, stream):
    prompt = engine.encode(CHAT)
    expected = alone(engine, prompt, max_tokens=9, temp=1.2, seed=5)
    reference = reference_logprobs(engine, prompt, expected.tokens)
    options = {"max_tokens": 9, "temperature": 1.2, "seed": 5, "logprobs": True, "top_logprobs": 4}
    answer = chat(client, stream=stream, **options)
    if stream:
        lists = [c.choices[0].logprobs.content for c in answer if c.choices[0].logprobs]
        found = [entry for entries in lists for entry in entries]
    else:
        found = answer.choices[0].logprobs.content
    assert len(found) == len(expected.tokens)
    for entry, token, row in zip(found, expected.tokens, reference, strict=True):
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert entry.token == engine.tokenizer.decode([token])
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = mx.argsort(-row)[:4].tolist()
        top = entry.top_logprobs
        assert [one.token for one in top] == [engine.tokenizer.decode([t]) for t in best]
        assert [one.logprob for one in top] == pytest.approx(row[mx.array(best)].tolist(), abs=1e-4)
    raw = b"".join(bytes(entry.bytes) for entry in found)
    assert raw.decode(errors="replace") == expected.text


def test_logprobs_of_completions(client, engine):
    prompt = engine.encode(CODE, raw=True)
    expected = alone(engine, prompt, max_tokens=7)
    reference = reference_logprobs(engine, prompt, expected.tokens)
    choice = complete(client, max_tokens=7, logprobs=2).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(7)]
    chosen = [row[token].item() for row, token in zip(reference, expected.tokens, strict=True)]
    assert found.token_logprobs == pytest.approx(chosen, abs=1e-4)
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == value == max(top.values())  # greedy takes the likeliest
    streamed = list(complete(client, max_tokens=7, logprobs=2, stream=True))
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [t for piece in pieces for t in piece.tokens] == found.tokens
    assert [o for piece in pieces for o in piece.text_offset] == found.text_offset


def test_logprobs_are_left_out_where_nobody_asks(client):
    assert chat(client).choices[0].logprobs is None
    none = chat(client, logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in none] == [[], [], []]


def test_the_model_is_listed(client, server):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "glm-fused"
    with pytest.raises(openai.NotFoundError, match="'gpt-4', which is not served here"):
        client.models.retrieve("gpt-4")


def test_eight_clients_at_once_get_what_each_gets_alone(server, engine):
    prompts = [f"def f{i}(x):\n" * (1 + i % 3) for i in range(8)]
    expected = [alone(engine, [{"role": "user", "content": p}], max_tokens=20) for p in prompts]
    start = threading.Barrier(8)

    def ask(prompt):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            start.wait(30)
            messages = [{"role": "user", "content": prompt}]
            stream = chat(client, messages=messages, max_tokens=20, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == [one.text for one in expected]


def test_a_seeded_text_does_not_depend_on_company(server, client):
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 30}
    expected = chat(client, **options).choices[0].message.content
    with ThreadPoolExecutor(6) as pool:
        seeds = [3, 4, 3, 5, 3, 6]
        answers = list(pool.map(lambda seed: chat(client, **options | {"seed": seed}), seeds))
    texts = [answer.choices[0].message.content for answer in answers]
    assert [text for text, seed in zip(texts, seeds, strict=True) if seed == 3] == [expected] * 3
    assert len(set(texts)) == 4
