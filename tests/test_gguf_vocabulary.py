"""Keys made of a tokenizer.json that was damaged: one clear error, or the ids of that tokenizer."""

import json
import random

import pytest
from test_gguf_tokenizer import GLM4, TEXTS
from tests.adversarial import harness
from tests.adversarial.kinds import _json
from tokenizers import Tokenizer, pre_tokenizers

from glm_fused.generation.gguf_tokenizer import WHOLE, TokenizerReader
from glm_fused.generation.gguf_vocabulary import vocabulary_of

SIZE = 300
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def sound():
    """A small tokenizer of GLM's kind, as JSON."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [["d", "e"], ["de", "f"], ["Ġ", "Ġ"], ["i", "n"]]
    tokens = alphabet + ["".join(pair) for pair in merges]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": GLM4}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(tokens) + i, "content": text, "special": i == 0} | FLAGS
            for i, text in enumerate(("<|endoftext|>", "<think>", "</think>"))
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, by_bytes | {"use_regex": False}],
        },
        "decoder": by_bytes | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def ids(text):
    """The ids of some texts by the tokenizer in a JSON text; None where it is none."""
    try:
        tokenizer = Tokenizer.from_str(text)
        return [tokenizer.encode(each, add_special_tokens=False).ids for each in TEXTS]
    except BaseException:  # a panic in the Rust of tokenizers is no Exception
        return None


def keys_of(folder, text):
    """The keys, and what was said of them."""
    (folder / "tokenizer.json").write_text(text, errors="surrogatepass")
    said = []
    return vocabulary_of(folder, SIZE, said.append), said


def test_a_sound_one(tmp_path):
    text = json.dumps(sound())
    keys, said = keys_of(tmp_path, text)
    assert said == [] and WHOLE not in keys
    read = TokenizerReader(tmp_path, keys).tables()
    assert ids(json.dumps(read)) == ids(text) is not None


def within(path):
    """Leave most of the vocabulary alone, or hardly anything else would be damaged."""
    return path[:2] != ("model", "vocab") or path[-1] in ("d", "de", "def", "Ġ")


@pytest.mark.parametrize("part", range(2))
def test_damaged_ones(tmp_path, part):
    content, outcomes = sound(), set()
    for seed in range(part * 400, part * 400 + 400):
        text, changed = _json.damaged(random.Random(seed), content, within)
        try:
            keys, said = keys_of(tmp_path, text)
        except (ValueError, OSError) as error:
            assert harness.clear_error(error), (seed, error)
            outcomes.add("refused")
            continue
        expected = ids(text)
        if WHOLE in keys:
            assert said and keys[WHOLE] == text, seed
            outcomes.add("whole")
        elif expected is not None:
            read = TokenizerReader(tmp_path, keys).tables()
            assert ids(json.dumps(read)) == expected, (seed, changed)
            outcomes.add("told")
    assert outcomes == {"refused", "whole", "told"}
