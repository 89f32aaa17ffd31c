"""Streaming generation and the comparison of both paths, on a tiny random checkpoint."""

import re

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glm_fused import load, ops
from glm_fused.cli.ab import compare, differing, format_comparison
from glm_fused.generation.generate import generate
from glm_fused.generation.options import Options
from glm_fused.generation.prompts import encode
from glm_fused.models.decode_step import DecodeSteps
from glm_fused.ops import paths

VOCAB = 256
WORDS = " ".join(f"w{i}" for i in range(3, 43))  # over twice index_topk


def write_tokenizer(folder, chat_template=None):
    """Write a tokenizer whose token i is the word ``wi``."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w250", chat_template=chat_template
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, tiny_config(), quantization={"group_size": 32, "bits": 4})
    write_tokenizer(folder, "w7 {{ messages[0]['content'] }} w8")
    return load(folder)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.delenv("GLM_FUSED_REFERENCE", raising=False)


def test_encode_applies_the_chat_template(loaded):
    assert encode(*loaded, "w5 w6") == [7, 5, 6, 8]
    assert encode(*loaded, "w5 w6", raw=True) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "0 tokens"), ("w1 " * 4096, "4096 tokens"), ("w1 \udcff", "UTF-8")],
    ids=["empty", "long", "surrogate"],
)
def test_encode_refuses(loaded, prompt, message):
    with pytest.raises(ValueError, match=message):
        encode(*loaded, prompt, raw=True)


def test_encode_refuses_tokens_beyond_the_vocabulary(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.args, "vocab_size", 50)
    with pytest.raises(ValueError, match="token 60"):
        encode(model, tokenizer, "w60", raw=True)


def test_generate_is_the_greedy_continuation(loaded):
    model, tokenizer = loaded
    prompt = encode(model, tokenizer, WORDS, raw=True)
    pieces = []
    completion = generate(model, tokenizer, prompt, Options(max_tokens=6), pieces.append)
    tokens = list(prompt)
    for token in completion.tokens:
        assert token == mx.argmax(model(mx.array([tokens]))[0, -1]).item()
        tokens.append(token)
    assert completion.text == "".join(pieces)
    assert completion.text.split() == [f"w{token}" for token in completion.tokens]
    assert completion.finish_reason == "length"
    assert completion.path == "fused"
    assert completion.prompt_tokens == len(prompt)


def test_one_token_has_no_speed(loaded):
    completion = generate(*loaded, [3, 4], Options(max_tokens=1))
    assert completion.generation_tps is None
    assert len(completion.tokens) == 1


def test_a_stop_token_ends_generation_but_not_a_comparison(loaded):
    model, tokenizer = loaded
    first = generate(model, tokenizer, [3, 4, 5], Options(max_tokens=1)).tokens
    eos = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = set(first)
    try:
        completion = generate(model, tokenizer, [3, 4, 5], Options(max_tokens=4))
        comparison = compare(model, [3, 4, 5], Options(max_tokens=4))
    finally:
        tokenizer.eos_token_ids = eos
    assert (completion.tokens, completion.text, completion.finish_reason) == (first, "", "stop")
    assert len(comparison.fused.tokens) == 4


def test_a_seed_makes_sampling_reproducible(loaded):
    def sample(seed):
        return generate(*loaded, [3, 4, 5], Options(12, temp=2.0, top_p=0.9, seed=seed)).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("options", [Options(8), Options(8, temp=1.5, top_p=0.9, seed=4)])
def test_both_paths_are_bit_identical(loaded, options):
    model, tokenizer = loaded
    prompt = encode(model, tokenizer, WORDS)
    comparison = compare(model, prompt, options)
    assert comparison.bit_identical
    assert len(comparison.fused.logits) == 8
    assert comparison.fused.tokens == generate(model, tokenizer, prompt, options).tokens
    assert "bit-identical: yes" in format_comparison(comparison).splitlines()


def test_a_comparison_runs_both_paths(loaded, monkeypatch):
    seen = set()
    original = ops.sparse_mla_decode

    def spy(*args, **kwargs):
        seen.add(paths.use_reference())
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "sparse_mla_decode", spy)
    compare(loaded[0], [3, 4], Options(max_tokens=1))
    assert seen == {False, True}


def test_a_comparison_finds_one_perturbed_value(loaded, monkeypatch):
    """One logit is changed on the fused path, in its fourth decode step."""
    calls = []

    def perturbed(original):
        def step(self, *args):
            found = original(self, *args)
            if found is None:
                return None
            calls.append(1)
            logits, hidden = found
            change = (mx.arange(logits.shape[-1]) == 5).astype(logits.dtype)
            return [logits + change if len(calls) == 4 else logits, hidden]

        return step

    for name in ("again", "run"):
        monkeypatch.setattr(DecodeSteps, name, perturbed(getattr(DecodeSteps, name)))
    comparison = compare(loaded[0], [3, 4, 5, 6], Options(max_tokens=8))
    assert not comparison.bit_identical
    assert comparison.first_difference["step"] > 0
    assert comparison.first_difference["logits"] > 0
    text = format_comparison(comparison)
    assert "bit-identical: no" in text.splitlines()
    assert "first difference: step" in text


def test_differing_compares_bits():
    nan = mx.array([float("nan"), 0.0, 1.0])
    assert differing(nan, nan) == 0
    assert differing(nan, mx.array([float("nan"), -0.0, 1.0])) == 1
    assert differing(mx.zeros((3,)), mx.zeros((4,))) == 4
    assert differing(mx.zeros((3,)), mx.zeros((3,), mx.bfloat16)) == 3


def test_debug_names_the_path_of_every_layer(loaded, monkeypatch, caplog):
    monkeypatch.setenv("GLM_FUSED_DEBUG", "1")
    with caplog.at_level("DEBUG", logger="glm_fused"):
        generate(*loaded, [3, 4], Options(max_tokens=1))
        with paths.reference_path():
            assert generate(*loaded, [3, 4], Options(max_tokens=1)).path == "reference"
    text = caplog.text
    formats = "/".join(["affine4-g32"] * 3)
    experts = rf"layer 4: shared indexer, experts {formats}: cpu \(\w+, \d+ threads\): "
    attention = "rms_norm, quantized_matvec, rotate, sparse_mla_decode"
    assert re.search(f"{experts}{attention}, router_topk, moe_decode", text)
    dense = f"layer 0: full indexer, dense mlp {formats}: loops (the reference, asked for)"
    attention = attention.replace("rms_norm", "rms_norm, layer_norm, indexer_topk")
    assert f"{dense}: {attention}" in text
