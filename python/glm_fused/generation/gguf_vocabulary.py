"""The tokenizer of a checkpoint's folder as keys of a GGUF file; `gguf_tokenizer` reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..checkpoint.folder import read_json
from ..foreign import foreign
from ..validation import show
from .gguf_tokenizer import (
    CONTROL,
    NORMAL,
    PRE,
    UNUSED,
    USER_DEFINED,
    WHOLE,
    TokenizerReader,
)

_FLAGS = ("single_word", "lstrip", "rstrip")  # of added tokens
_OPTIONS = ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix")  # of BPE


def vocabulary_of(folder: Path, size: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The keys for a vocabulary of ``size`` tokens, and the chat template.

    Where the keys that llama.cpp reads cannot say all of the tokenizer, tokenizer.json is one of
    them; that, and a folder without a tokenizer, ``say`` is told. Raises ValueError, naming the
    file, for a tokenizer that is no byte-level BPE or has more tokens.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        say(f"{folder} has no tokenizer.json: the file has no vocabulary")
        return {"tokenizer.ggml.model": "none"}
    content = read_json(file)
    with foreign(f"[convert] the tokenizer in {file} does not load"):
        tokenizer = Tokenizer.from_file(str(file))
    keys = _tables(file, content, tokenizer, size)
    if not _is_told(file, content, tokenizer, keys):
        keys["tokenizer.ggml.pre"] = "default"
        keys[WHOLE] = file.read_text(encoding="utf-8")
        say(f"{file} is not GLM's kind: glm-fused reads it whole, llama.cpp its tokens alone")
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    ids = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    padding = config.get("pad_token")
    padding = padding.get("content") if isinstance(padding, dict) else padding
    if isinstance(padding, str) and padding in ids:
        keys["tokenizer.ggml.padding_token_id"] = ids[padding]
    return keys | _template(folder, config)


def _tables(file: Path, content: dict[str, Any], tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The tokens, their types and the merges; tokens that are missing are unused ones."""
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("merges"):
        raise ValueError(
            f"[convert] {file}: model {show(model.get('type'))}, expected 'BPE' with merges."
        )
    known = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(known) >= size:
        raise ValueError(f"[convert] {file}: token {max(known)}, expected 0 to {size - 1}.")
    kinds = dict.fromkeys(known, NORMAL)
    for i, token in tokenizer.get_added_tokens_decoder().items():
        kinds[i] = CONTROL if token.special else USER_DEFINED
    types = np.full(size, UNUSED, np.int32)
    for i, kind in kinds.items():
        types[i] = kind
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    words = model.get("ignore_merges") is True
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": next(name for name, (_, ignore) in PRE.items() if ignore is words),
        "tokenizer.ggml.tokens": [known.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": pairs,
    }


def _is_told(
    file: Path, content: dict[str, Any], tokenizer: Tokenizer, keys: dict[str, Any]
) -> bool:
    """Whether what the tables say gives the ids that the tokenizer gives."""
    read, model = TokenizerReader(file, keys).tables(), content["model"]
    return (
        read["model"]["vocab"] == tokenizer.get_vocab(with_added_tokens=True)
        and not any(
            getattr(token, flag)
            for token in tokenizer.get_added_tokens_decoder().values()
            for flag in _FLAGS
        )
        and not any(model.get(key) for key in _OPTIONS)
        and not content.get("normalizer")
        and _cut(content) == _cut(read)
    )


def _cut(content: dict[str, Any]) -> Any:
    """How text is cut into words, but for offsets."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    return [{key: v for key, v in step.items() if key != "trim_offsets"} for step in steps]


def _template(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    return {"tokenizer.chat_template": text} if isinstance(text, str) else {}
