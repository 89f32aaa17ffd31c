"""Log-probabilities of a prompt's tokens are those of the model's logits, bit for bit."""

import struct

import mlx.core as mx
import openai
import pytest
from served import served
from test_scheduler import Listener

from glm_fused import Engine, EngineOptions
from glm_fused.generation.batching import filling
from glm_fused.generation.batching.filling import Filling, Prompt
from glm_fused.generation.batching.requests import GenerationRequest, PromptProgress, ScoredToken
from glm_fused.generation.batching.rows import Row
from glm_fused.generation.batching.scheduler import Scheduler
from glm_fused.generation.ending import Text
from glm_fused.generation.options import Options

CODE = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
TEXTS = [CODE * 5, "x", CODE]


@pytest.fixture(scope="module", params=["resident", "streamed"])
def engine(request):
    options = EngineOptions(slots=6, context=4096, prompt_cache="8MiB")
    if request.param == "resident":
        options = EngineOptions(prompt_cache="8MiB")
    with Engine("demo", options) as engine:
        yield engine


def bits(value):
    return None if value is None else struct.pack("<f", value)


def expected(engine, tokens, top):
    """The scores by one forward of all tokens, each place by itself."""
    logits = engine.step(mx.array([tokens]))[0].astype(mx.float32)
    found = [ScoredToken(tokens[0])]
    for token, row in zip(tokens[1:], logits, strict=False):
        row = row - mx.logsumexp(row)
        values = row.tolist()
        best = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top]
        found.append(ScoredToken(token, values[token], tuple((t, values[t]) for t in best)))
    return found


def check(found, wanted):
    assert [one.token for one in found] == [one.token for one in wanted]
    for one, right in zip(found, wanted, strict=True):
        assert bits(one.logprob) == bits(right.logprob)
        assert [(t, bits(v)) for t, v in one.top] == [(t, bits(v)) for t, v in right.top]


def scored(events):
    progress = [event for event in events if isinstance(event, PromptProgress)]
    return [one for event in progress for one in event.scored]


def filled(engine, texts, top, step):
    """What the rows of one filling are told of, whose prompts are taken ``step`` at a time."""
    prompts, told = [engine.encode(text, raw=True) for text in texts], [[] for _ in texts]
    rows = []
    for prompt, events in zip(prompts, told, strict=True):
        ending = Text(engine.tokenizer, (), 1)
        asked = GenerationRequest(prompt, Options(1), top, scores_prompt=True)
        rows.append(Row(asked, engine.model.args.vocab_size, ending, events.append))
    unbegun = [Prompt(row, engine.model.make_cache(), 0) for row in rows]
    taken = Filling(engine.model, unbegun, None)
    while taken.left:
        taken.take(step)
    return prompts, [scored(events) for events in told]


@pytest.mark.parametrize(("top", "step"), [(3, 4096), (0, 50)])
def test_prompts_of_unlike_lengths_side_by_side(engine, monkeypatch, top, step):
    prompts, found = filled(engine, TEXTS, top, step)
    assert len(prompts[0]) > 2 * filling._SCORED and len(prompts[1]) == 1
    for tokens, given in zip(prompts, found, strict=True):
        check(given, expected(engine, tokens, top))
    real = Filling._scores
    monkeypatch.setattr(
        Filling, "_scores", lambda self, i, first, hidden: real(self, i, first, hidden[::-1])
    )
    prompts, wrong = filled(engine, TEXTS[:1], top, step)
    with pytest.raises(AssertionError):  # the control: states in another order
        check(wrong[0], expected(engine, prompts[0], top))


def test_a_store_gives_nothing_to_a_prompt_that_is_scored(engine):
    tokens, store = engine.encode(CODE, raw=True), engine.prompt_store(1 << 23)
    scheduler = Scheduler(engine, store=store)
    try:
        for scores in (False, True):
            asked = GenerationRequest(tokens, Options(2), 2, scores_prompt=scores)
            scheduler.submit(asked, listener := Listener())
            listener.wait()
            check(scored(listener.events), expected(engine, tokens, 2) if scores else [])
        assert store.take(tokens)[1] > 0  # the control: it has what could be taken
    finally:
        scheduler.close()


@pytest.fixture(scope="module")
def client(engine):
    with (
        served(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def complete(client, **options):
    given = {"model": "demo", "prompt": CODE, "max_tokens": 3, "temperature": 0, "logprobs": 2}
    return client.completions.create(**given | {"echo": True} | options)


def test_completions_echo_log_probabilities(client, engine):
    prompts = [engine.encode(text, raw=True) for text in (CODE, "class Tree:\n")]
    answer = complete(client, prompt=prompts)
    for choice, tokens in zip(answer.choices, prompts, strict=True):
        given, wanted = choice.logprobs, expected(engine, tokens, 2)
        assert choice.text.startswith(engine.tokenizer.decode(tokens))
        assert "".join(given.tokens) == choice.text
        assert len(given.tokens) == len(tokens) + 3
        assert given.text_offset == [len("".join(given.tokens[:i])) for i in range(len(tokens) + 3)]
        values = given.token_logprobs[: len(tokens)]
        assert list(map(bits, values)) == [bits(one.logprob) for one in wanted]
        assert given.top_logprobs[0] is None and values[0] is None
        for top, one in zip(given.top_logprobs[1:], wanted[1:], strict=False):
            assert max(top.values()) == one.top[0][1]
    plain = complete(client, echo=False).choices[0]
    assert answer.choices[0].text == CODE + plain.text
    assert answer.choices[0].logprobs.token_logprobs[-3:] == plain.logprobs.token_logprobs


@pytest.mark.parametrize("logprobs", [2, None])
def test_a_stream_echoes_first_what_it_echoes_at_once(client, logprobs):
    whole = complete(client, logprobs=logprobs).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, logprobs=logprobs, stream=True)]
    assert chunks[0].text == CODE and "".join(chunk.text for chunk in chunks) == whole.text
    lists = [chunk.logprobs for chunk in chunks if chunk.logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for each in lists for one in getattr(each, name)]
        assert joined == (getattr(whole.logprobs, name) if logprobs else [])
