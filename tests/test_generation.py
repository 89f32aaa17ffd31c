"""Generation for library users: prompts, pieces, limits, sampling and stop texts."""

import json
from random import Random

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from test_generate import WORDS, write_tokenizer
from test_generate import loaded as loaded

import glm_fused
from glm_fused import load
from glm_fused.cli.ab import compare
from glm_fused.generation.generate import generate
from glm_fused.generation.options import Options, checkpoint_options
from glm_fused.generation.prompts import encode
from glm_fused.generation.stops import StopTexts


def test_tokens_arrays_and_chats_are_prompts(loaded):
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "w5 w6"}]
    assert encode(model, tokenizer, chat) == [7, 5, 6, 8]
    assert encode(model, tokenizer, [5, 6]) == [5, 6]
    assert encode(model, tokenizer, np.array([5, 6]).tolist()) == [5, 6]
    assert encode(model, tokenizer, list(np.array([5, 6]))) == [5, 6]
    assert encode(model, tokenizer, mx.array([5, 6])) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, 256], "token 1 is 256, expected an integer from 0 to 255"),
        ([-1], "token 0 is -1"),
        ([True, 1], "token 0 is True"),
        ([1.0], r"token 0 is 1\.0"),
        (mx.array([[1, 2]]), r"token 0 is \[1, 2\]"),
        ([], "0 tokens, expected 1 to 4095"),
        ([1] * 4096, "4096 tokens, expected 1 to 4095, by the model's max_position_embeddings"),
        (None, "a text, messages or a list of tokens, found None"),
    ],
)
def test_prompts_that_are_none(loaded, prompt, message):
    with pytest.raises(ValueError, match=message):
        glm_fused.stream_generate(*loaded, prompt)


def test_stream_generate_gives_generates_pieces(loaded):
    whole = glm_fused.generate(*loaded, WORDS, max_tokens=6, raw=True)
    pieces = list(glm_fused.stream_generate(*loaded, WORDS, max_tokens=6, raw=True))
    assert [piece.token for piece in pieces] == whole.tokens
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces] == [None] * 5 + ["length"]


def test_the_context_limits_generation(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.args, "max_position_embeddings", 50)
    monkeypatch.setattr(model.model, "_context", 50)  # the last forward fills it
    prompt = [3] * 44
    with pytest.raises(ValueError, match=r"44 prompt tokens and 7 more .* at most 6 more fit"):
        generate(model, tokenizer, prompt, max_tokens=7)
    for given in ({}, {"max_tokens": 6}):
        completion = generate(model, tokenizer, prompt, **given)
        assert (len(completion.tokens), completion.finish_reason) == (6, "length")
    with pytest.raises(ValueError, match="7 more"):
        compare(model, prompt, Options(max_tokens=7))


def test_progress_goes_from_nothing_to_all(loaded):
    seen = []
    prompt = [3] * 2100  # two chunks
    generate(*loaded, prompt, max_tokens=2, on_progress=lambda *step: seen.append(step))
    assert seen[0] == ("prompt", 0, 2100)
    assert ("prompt", 2048, 2100) in seen
    assert seen[-3:] == [("prompt", 2100, 2100), ("generation", 1, 2), ("generation", 2, 2)]
    seen.clear()
    compare(loaded[0], [3, 4], Options(max_tokens=2), lambda *step: seen.append(step))
    assert [step for step in seen if step[1] == step[2]] == [
        (f"{path}, {what}", 2, 2) for path in ("fused", "reference")
        for what in ("prompt", "generation")
    ]  # fmt: skip


def test_a_stop_text_ends_the_text_before_it(loaded):
    model, tokenizer = loaded
    plain = generate(model, tokenizer, [3, 4, 5], max_tokens=8)
    words = plain.text.split()
    stop = f"{words[2][1:]} {words[3]}"  # begins within a token and goes over two
    at = plain.text.index(stop)
    pieces = []
    completion = generate(model, tokenizer, [3, 4, 5], None, pieces.append, max_tokens=8, stop=stop)
    assert completion.text == "".join(pieces) == plain.text[:at]
    assert completion.finish_reason == "stop"
    assert completion.tokens == plain.tokens[: len(completion.tokens)]
    assert len(completion.tokens) <= 4


def test_what_only_looks_like_a_stop_text_is_kept(loaded):
    model, tokenizer = loaded
    plain = generate(model, tokenizer, [3, 4, 5], max_tokens=5)
    stop = [plain.text[-4:] + "never", plain.text[2:5] + "never"]
    completion = generate(model, tokenizer, [3, 4, 5], max_tokens=5, stop=stop)
    assert (completion.text, completion.finish_reason) == (plain.text, "length")


@pytest.mark.parametrize("seed", range(20))
def test_stop_texts_are_found_however_the_text_is_cut(seed):
    random = Random(seed)
    text = "".join(random.choices("ab", k=60))
    stops = ["".join(random.choices("ab", k=random.randint(1, 7))) for _ in range(3)]
    stops = [stop for stop in stops if len(stop) > 2] or ["aaaaaa"]
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    found, out, stopped = StopTexts(stops), "", False
    left = text
    while left and not stopped:
        cut = random.randint(1, 5)
        shown, stopped = found.feed(left[:cut])
        out, left = out + shown, left[cut:]
    if stopped:
        # A shorter stop text may be complete before an earlier, longer one is.
        assert len(out) in ends
        assert not any(stop in out for stop in stops)
    else:
        assert not ends
        assert out + found.rest() == text


def test_sampling_is_mlx_lms(loaded):
    model, tokenizer = loaded
    choices = {"temp": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    stream = mlx_lm.stream_generate(
        model,
        tokenizer,
        [3, 4, 5],
        12,
        sampler=make_sampler(1.5, 0.9, 0.01, top_k=40),
        logits_processors=make_logits_processors(None, 1.3, 5),
    )
    mx.random.seed(3)
    expected = [response.token for response in stream]
    penalty = {"repetition_penalty": 1.3, "repetition_context_size": 5}
    found = generate(model, tokenizer, [3, 4, 5], max_tokens=12, seed=3, **choices, **penalty)
    assert found.tokens == expected
    comparison = compare(model, [3, 4, 5], Options(12, seed=3, **choices, **penalty))
    assert comparison.bit_identical
    assert comparison.fused.tokens == expected


def test_a_top_k_of_the_vocabulary_keeps_every_token(loaded):
    def sample(top_k):
        return generate(*loaded, [3, 4], max_tokens=6, temp=1.0, seed=1, top_k=top_k).tokens

    assert sample(256) == sample(1000) == sample(0)
    assert sample(1) == generate(*loaded, [3, 4], max_tokens=6).tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temp": -1.0}, r"temp is -1\.0, expected a number of at least 0"),
        ({"temp": "1"}, "temp is '1'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 1.5}, r"top_k is 1\.5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_context_size": 0}, "repetition_context_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": [1]}, r"stop is \[1\]"),
        ({"temperature": 1.0}, "temperature: no such option; there are max_tokens, temp"),
    ],
)
def test_options_that_cannot_be(loaded, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(*loaded, [3], **changes)


def test_options_of_the_checkpoint(tmp_path):
    def options(**config):
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        return checkpoint_options(tmp_path)

    assert checkpoint_options(tmp_path) == Options()
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1}
    assert options(**sampled) == Options(temp=0.7, top_p=0.8, top_k=20, min_p=0.1)
    assert options(do_sample=True, top_p=None) == Options(temp=1.0)
    greedy = sampled | {"do_sample": False, "repetition_penalty": 1.1}
    assert options(**greedy) == Options(repetition_penalty=1.1)
    assert options(temperature=0.7) == Options()
    for key, value in (
        ("temperature", "hot"), ("temperature", -1), ("top_p", 0), ("top_k", 2.5), ("min_p", True),
        ("repetition_penalty", 0), ("do_sample", "yes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"generation_config\.json: {key} is "):
            options(**{key: value})


def test_load_takes_the_checkpoints_options(tmp_path):
    write_checkpoint(tmp_path, tiny_config())
    config = {"do_sample": True, "temperature": 3.0, "eos_token_id": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path)
    model, tokenizer = load(tmp_path)
    assert model.options == Options(temp=3.0)
    sampled = generate(model, tokenizer, [3, 4], max_tokens=6, seed=1)
    explicit = generate(model, tokenizer, [3, 4], Options(6, temp=3.0, seed=1))
    assert sampled.tokens == explicit.tokens
    assert sampled.tokens != generate(model, tokenizer, [3, 4], max_tokens=6, temp=0.0).tokens
