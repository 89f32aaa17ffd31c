"""Damaged tokenizer files are one error, or give tokens of the vocabulary and some text."""

import json
import random
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

from tests.adversarial.harness import Wrong
from tests.adversarial.kinds import _command, _json, _model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.generation import tokenizer as loader
from glm_fused.generation.prompts import encode

NAME = "tokenizer"
SLOW_CASES = 2000
KINDS = ("words", "bytes", "pieces")
FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EXTRA = {
    "chat_template": [5, [], {}, True, [{"name": "default"}], "{{ x.y }}"],
    "chat_template_type": ["none_such", 5, "../x"],
    "tool_parser_type": ["none_such", "glm47", 5],
    "tokenizer_class": ["LlamaTokenizer", "NoneSuch", 5, None, "GPT2Tokenizer"],
    "model_max_length": [0, -1, 10**400, 1e308, "x", None],
    "eos_token": ["none_such", 5, None, {"content": "w3"}, {"content": 3}, []],
    "added_tokens_decoder": [{"3": {"content": "w3"}}, {"x": {}}, {"9" * 400: {"content": "y"}}, 5],
    "extra_special_tokens": [["w1"], {"a": "w1"}, {"a": 5}, 5],
    "auto_map": [{"AutoTokenizer": ["x.y", None]}, 5],
    "padding_side": ["left", "up", 5],
    "clean_up_tokenization_spaces": [True, 5, None],
}  # fmt: skip


def prepare(folder):
    """Make checkpoints with a tokenizer of words, of bytes, and of pieces with byte fall-back."""
    for kind in KINDS:
        _model.write(folder / kind)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:240]
    merges = [("w", "1"), ("w", "2"), ("a", "b")]
    vocabulary = alphabet + ["".join(m) for m in merges] + ["<end>"]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    save(bpe, folder / "bytes")
    vocabulary = ["<unk>", "<end>", "▁", "▁w", "w", "1", "2", "a", "b"]
    vocabulary += [f"<0x{b:02X}>" for b in range(200)]
    pieces = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(vocabulary)},
            [("▁", "w")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    save(pieces, folder / "pieces")


def save(tokenizer, folder):
    """Save a tokenizer in the files that transformers writes."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def damage(rng, folder):
    """Make a damaged copy of one of the checkpoints."""
    good = folder / rng.choice(KINDS)
    name = rng.choice(FILES)
    bad = _model.clone(good, folder / "bad", name)
    content = {}
    if (good / name).exists():
        content = json.loads((good / name).read_text())
    if name != "tokenizer.json" and (rng.random() < 0.6 or not content):
        key = rng.choice(list(EXTRA))
        text = json.dumps(content | {key: rng.choice(EXTRA[key])})
    elif rng.random() < 0.15:
        text = _json.damaged_bytes(rng, json.dumps(content).encode()).decode("latin1")
    else:
        text = _json.damaged(rng, content, in_parts(rng))[0]
    (bad / name).write_text(text, errors="surrogatepass")
    return bad


def in_parts(rng):
    """Which paths may change: mostly not the many entries of the vocabulary. None is all."""
    if rng.random() < 0.3:
        return None
    return lambda path: path[:2] not in (("model", "vocab"), ("model", "merges")) or len(path) < 3


def through_command(bad):
    """Run the damaged tokenizer through the command line; returns the outcome."""
    command = ("generate", "--model", bad, "--prompt", "w1 w2", "--max-tokens", 3)
    code, out, err = _command.run(*command)
    if code not in (0, 2) or (code == 2 and not err.startswith("glm-fused: error: ")):
        raise Wrong(f"exit code {code}: {out!r} {err!r}")
    return f"error: {err.strip()}" if code else "right"


def case(seed, folder):
    """Load one tokenizer, and ask it for tokens and for the text of any tokens."""
    rng = random.Random(seed)
    bad = damage(rng, folder)
    if seed % 20 == 0:
        return through_command(bad)
    checkpoint = Checkpoint.open(bad)
    tokenizer = loader.load_tokenizer(checkpoint)
    args = SimpleNamespace(vocab_size=256, max_position_embeddings=4096)
    model = SimpleNamespace(args=args, context=4096)
    prompt = rng.choice(["w1 w2", "w250 abc", "é\0 w1", "a b" * 50])
    tokens = encode(model, tokenizer, prompt, rng.random() < 0.7)
    if not all(type(t) is int and 0 <= t < 256 for t in tokens):
        raise Wrong(f"tokens outside the vocabulary: {tokens}")
    detokenizer = tokenizer.detokenizer
    text = ""
    for _ in range(40):
        detokenizer.add_token(rng.randrange(256))
        text += detokenizer.last_segment
    detokenizer.finalize()
    text += detokenizer.last_segment
    if not isinstance(text, str):
        raise Wrong(f"no text: {text!r}")
    tokenizer.decode(tokens)
    return "right"


@contextmanager
def planted():
    """Whatever transformers and tokenizers raise goes on."""
    with mock.patch.object(loader, "foreign", lambda what: nullcontext()):
        yield
