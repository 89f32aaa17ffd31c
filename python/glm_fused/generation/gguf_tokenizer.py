"""The tokenizer in a GGUF file's metadata, as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..validation import show

WHOLE = "tokenizer.huggingface.json"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How `tokenizer.ggml.pre` has text cut into words, and whether a word that is a token needs no
# merges.
PRE = {"glm4": (_WORDS, True), "glm5": (_WORDS, True), "chatglm-bpe": (_WORDS, False)}


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template of the GGUF file ``path``.

    Texts begin with no token of their own, whatever `tokenizer.ggml.add_bos_token` says: the chat
    templates of GLM write those. Raises ValueError, naming the file and the key with what was found
    and expected.
    """
    reader = TokenizerReader(path, metadata)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(reader.tokenizer())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | reader.special_tokens()))
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise reader.error("tokenizer.chat_template", template, "a text")
        (folder / "chat_template.jinja").write_text(template)


class TokenizerReader:
    """Reads the keys of a file; its errors name them, with what was found and expected."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self._path, self._metadata = path, metadata

    def error(self, key: str, found: object, expected: str) -> ValueError:
        found = "missing" if found is None else f"is {show(found)}"
        return ValueError(f"[tokenizer] {self._path}: key {key!r} {found}, expected {expected}.")

    def tokenizer(self) -> str:
        """The text of tokenizer.json: that in the file or, where there is none, of its tables."""
        whole = self._metadata.get(WHOLE)
        if whole is None:
            return json.dumps(self.tables())
        if not isinstance(whole, str):
            raise self.error(WHOLE, whole, "a text")
        return whole

    def special_tokens(self) -> dict[str, str]:
        tokens, found = self._texts("tokens"), {}
        for name, key in (("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
            token = self._metadata.get(f"tokenizer.ggml.{key}")
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < len(tokens):
                expected = f"a token from 0 to {len(tokens) - 1}"
                raise self.error(f"tokenizer.ggml.{key}", token, expected)
            found[name] = tokens[token]
        return found

    def tables(self) -> dict[str, Any]:
        """What tokenizer.json would have, as the tables say."""
        if (found := self._metadata.get("tokenizer.ggml.model")) != "gpt2":
            raise self.error("tokenizer.ggml.model", found, "'gpt2' (byte-level BPE)")
        pre = self._metadata.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in PRE:
            raise self.error("tokenizer.ggml.pre", pre, " or ".join(map(repr, PRE)))
        words, ignore_merges = PRE[pre]
        tokens, types = self._texts("tokens"), self._types()
        vocabulary = {t: i for i, t in enumerate(tokens) if types[i] != UNUSED}
        if len(vocabulary) != sum(kind != UNUSED for kind in types):
            raise self.error("tokenizer.ggml.tokens", tokens, "no token twice")
        by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"}
        return {
            "version": "1.0",
            "added_tokens": _added_tokens(tokens, types),
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split | {"invert": False}, by_bytes | {"use_regex": False}],
            },
            "decoder": by_bytes | {"use_regex": True},
            "model": {
                "type": "BPE",
                "ignore_merges": ignore_merges,
                "vocab": vocabulary,
                "merges": self._merges(),
            },
        }

    def _texts(self, name: str) -> list[str]:
        key = f"tokenizer.ggml.{name}"
        found = self._metadata.get(key)
        if not isinstance(found, list) or not found or not isinstance(found[0], str):
            raise self.error(key, found, "an array of texts")
        return found

    def _types(self) -> list[int]:
        key, count = "tokenizer.ggml.token_type", len(self._texts("tokens"))
        found = self._metadata.get(key)
        if getattr(found, "shape", None) != (count,) or found.dtype.kind not in "iu":  # type: ignore[union-attr]
            raise self.error(key, found, f"an array of {count} integers")
        return found.tolist()  # type: ignore[union-attr,no-any-return]

    def _merges(self) -> list[list[str]]:
        merges = [merge.split(" ") for merge in self._texts("merges")]
        for pair in merges:
            if len(pair) != 2:
                raise self.error("tokenizer.ggml.merges", " ".join(pair), "two texts each")
        return merges


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, "special": kind == CONTROL} | plain
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
