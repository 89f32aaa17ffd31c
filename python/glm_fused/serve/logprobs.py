"""How each API names tokens and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..generation.batching.requests import GeneratedToken, ScoredToken

LEAST = -9999.0  # what OpenAI's API has for a token that cannot be
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenNames:
    """The bytes and the text of single tokens."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        self._byte_level = _is_byte_level(tokenizer)

    def ends(self, token: int) -> bool:
        """Whether a text ends with this token, which is no part of it."""
        return token in self._tokenizer.eos_token_ids

    def bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        if self._byte_level and token not in self._added:
            name = self._tokenizer.convert_ids_to_tokens(token)
            if name is not None and all(character in _BYTES for character in name):
                return bytes(_BYTES[character] for character in name)
        return str(self._tokenizer.decode([token])).encode()

    def text(self, token: int) -> str:
        """The token's text; U+FFFD stands for bytes that are no character by themselves."""
        return self.bytes(token).decode(errors="replace")

    def chat(self, event: GeneratedToken) -> dict[str, Any]:
        """A token of chat/completions' ``logprobs.content``."""
        top = [self._chat(token, logprob) for token, logprob in event.top]
        assert event.logprob is not None
        return self._chat(event.token, event.logprob) | {"top_logprobs": top}

    def _chat(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes(token)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": max(logprob, LEAST),
            "bytes": list(raw),
        }

    def completion(
        self, events: Sequence[ScoredToken | GeneratedToken], offset: int
    ) -> dict[str, Any]:
        """The ``logprobs`` of completions, of tokens whose text begins at ``offset``.

        The first token of a prompt, which nothing is before, has none.
        """
        texts = [self.text(event.token) for event in events]
        starts = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [
                None if event.logprob is None else max(event.logprob, LEAST) for event in events
            ],
            "top_logprobs": [
                None if event.logprob is None else self._likeliest(event) for event in events
            ],
            "text_offset": starts,
        }

    def _likeliest(self, event: ScoredToken | GeneratedToken) -> dict[str, float]:
        """By their texts; of several with the same text, the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in event.top:
            found.setdefault(self.text(token), max(logprob, LEAST))
        return found


def _is_byte_level(tokenizer: TokenizerWrapper) -> bool:
    """Whether tokens are written in GPT-2's letters, of which each stands for a byte."""
    name = tokenizer.convert_ids_to_tokens(tokenizer.encode(" ", add_special_tokens=False)[0])
    return isinstance(name, str) and name.startswith("Ġ")
