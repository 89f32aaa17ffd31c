"""The tokenizer in a GGUF file gives the ids of the one that it was written from."""

import json

import pytest
from conftest import tiny_config
from gguf_files import tokenizer_metadata, write_gguf
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.cli import main
from glm_fused.generation.chat import render
from glm_fused.generation.tokenizer import load_tokenizer

# As the tokenizer.json of GLM-4.5 to 5.2 has it.
GLM4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "def main(argv):\n    for i in range(10):\n\t\tprint(f'{i:>3} x', argv[1:])\n\n\nif x:\r\n  y",
    "It's the engineers' 3rd attempt; they'LL see 1234567 of 89.5 % -- won't they?",
    "中文分词测试:模型在2026年发布。日本語のテスト、한국어 시험",
    "🙂👩‍👩‍👧 café naïve ẞß \u200b\u00a0end",
    "<|endoftext|>a<|endoftext|> <think>no</think>\n<|end",
    "",
    "   leading and trailing   ",
]
CONFIG = {"vocab_size": 2050}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with the bundled vocabulary, two more tokens, and GLM's way to cut words."""
    folder = tmp_path_factory.mktemp("original")
    content = json.loads((bundled_folder() / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for i, text in enumerate(("<think>", "</think>")):
        content["added_tokens"].append({"id": 2048 + i, "content": text} | flags)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(original, tmp_path_factory):
    values = tokenizer_metadata(original) | {
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2049,
        "tokenizer.chat_template": TEMPLATE,
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(path, tiny_config(**CONFIG), values=values)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_the_original_s(original, model, text):
    expected = Tokenizer.from_file(str(original / "tokenizer.json")).encode(text).ids
    tokenizer = load_tokenizer(Checkpoint.open(model))
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    detokenizer = tokenizer.detokenizer
    for token in expected:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text.lstrip() == text.lstrip()  # it may leave out the first space


def test_words_are_not_cut_as_the_bundled_model_has_it(model):
    """The test above would not tell otherwise: both have the same vocabulary."""
    bundled = Tokenizer.from_file(str(bundled_folder() / "tokenizer.json"))
    tokenizer = load_tokenizer(Checkpoint.open(model))
    assert any(tokenizer.encode(text) != bundled.encode(text).ids for text in TEXTS[:2])


def test_stop_tokens_and_chat_template(model):
    tokenizer = load_tokenizer(Checkpoint.open(model))
    assert set(tokenizer.eos_token_ids) == {0, 2049}
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = render(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "<user>Hi"


def test_a_failing_template_names_the_file(model, tmp_path):
    values = {"tokenizer.chat_template": "{{ raise_exception('no') }}"}
    folder = bundled_folder()
    values |= {"tokenizer.huggingface.json": (folder / "tokenizer.json").read_text()}
    values |= tokenizer_metadata(folder)
    path = write_gguf(tmp_path / "m.gguf", tiny_config(**CONFIG), values=values)
    tokenizer = load_tokenizer(Checkpoint.open(path))
    with pytest.raises(ValueError, match=f"chat template in {path} fails: no"):
        render(tokenizer, [{"role": "user", "content": "Hi"}])


def test_a_whole_tokenizer_goes_before_tables(tmp_path):
    folder = bundled_folder()
    values = tokenizer_metadata(folder)
    values["tokenizer.huggingface.json"] = (folder / "tokenizer.json").read_text()
    path = write_gguf(tmp_path / "m.gguf", tiny_config(**CONFIG), values=values)
    tokenizer, bundled = (load_tokenizer(Checkpoint.open(p)) for p in (path, folder))
    assert [tokenizer.encode(text) for text in TEXTS] == [bundled.encode(text) for text in TEXTS]


def test_generate_from_a_file(model, capsys):
    arguments = ["generate", "--model", str(model), "--prompt", "def f(x):", "--raw", "--json"]
    assert main([*arguments, "--max-tokens", "5"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", None, "missing, expected 'gpt2'"),
        ("tokenizer.ggml.model", "llama", "is 'llama', expected 'gpt2'"),
        ("tokenizer.ggml.pre", "llama-bpe", "is 'llama-bpe', expected 'glm4' or"),
        ("tokenizer.ggml.pre", None, "missing, expected 'glm4' or"),
        ("tokenizer.ggml.tokens", None, "missing, expected an array of texts"),
        ("tokenizer.ggml.tokens", ["a"] * 2050, "expected no token twice"),
        ("tokenizer.ggml.token_type", [1, 1], "expected an array of 2050 integers"),
        ("tokenizer.ggml.merges", ["a b c"], "is 'a b c', expected two texts each"),
        ("tokenizer.ggml.eos_token_id", 2050, "is 2050, expected a token from 0 to 2049"),
        ("tokenizer.chat_template", 7, "is 7, expected a text"),
    ],
)
def test_tables_that_are_none_are_one_error(original, tmp_path, key, value, message):
    values = tokenizer_metadata(original) | {"tokenizer.ggml.eos_token_id": 0}
    path = write_gguf(tmp_path / "m.gguf", tiny_config(**CONFIG), values=values | {key: value})
    with pytest.raises(ValueError) as error:
        load_tokenizer(Checkpoint.open(path))
    assert str(error.value).startswith(f"[tokenizer] {path}: key {key!r} ")
    assert message in str(error.value)


def test_merges_that_the_library_refuses_are_one_error(original, tmp_path):
    values = tokenizer_metadata(original) | {"tokenizer.ggml.merges": ["zz qq"]}
    path = write_gguf(tmp_path / "m.gguf", tiny_config(**CONFIG), values=values)
    with pytest.raises(ValueError, match=f"the tokenizer in {path} does not load"):
        load_tokenizer(Checkpoint.open(path))
