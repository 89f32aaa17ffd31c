"""Prompts: texts, chats and lists of tokens, checked against the model before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..foreign import foreign
from ..models.decoder import Model
from ..validation import show
from . import chat
from .limits import DEFAULT_TOKENS


class ContextExceeded(ValueError):
    """A prompt, or it and what is to follow, has more tokens than there is room for."""


Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | mx.array


def encode(
    model: Model, tokenizer: TokenizerWrapper, prompt: Prompt, raw: bool = False
) -> list[int]:
    """The prompt's tokens.

    A text is one message within the chat template unless ``raw`` or the model has none; a list of
    messages, ``{"role", "content"}``, is a chat; a list or 1-D array of tokens is taken as it is.

    Raises ValueError for a prompt that is empty, fills the context, is not text, or has tokens that
    the model lacks.
    """
    if not isinstance(prompt, (str, mx.array)) and prompt and isinstance(prompt[0], Mapping):
        if not tokenizer.has_chat_template:
            raise ValueError("[prompt] messages need a chat template, which the tokenizer lacks.")
        tokens = chat.render(tokenizer, cast(Sequence[Mapping[str, str]], prompt))
    elif isinstance(prompt, str):
        tokens = _text_tokens(tokenizer, prompt, raw)
    else:
        tokens = _listed(prompt, model.args.vocab_size)
    limit = model.context
    if not 0 < len(tokens) < limit:
        raise (ContextExceeded if tokens else ValueError)(
            f"[prompt] the prompt is {len(tokens)} tokens, expected 1 to {limit - 1}"
            f"{_limited_by(model)}."
        )
    if max(tokens) >= model.args.vocab_size:
        raise ValueError(
            f"[prompt] the tokenizer gave token {max(tokens)}, but the model's vocabulary has"
            f" {model.args.vocab_size}: they do not belong together."
        )
    return tokens


def room(model: Model, prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens to generate after a prompt.

    Returns ``max_tokens``, and raises ValueError where they do not fit in the context. If it is
    None, returns the usual number, or fewer where the context has less room.
    """
    left = model.context - prompt_tokens
    if max_tokens is None:
        return min(DEFAULT_TOKENS, left)
    if max_tokens > left:
        raise ContextExceeded(
            f"[prompt] {prompt_tokens} prompt tokens and {max_tokens} more (max_tokens) exceed the"
            f" context of {model.context} tokens{_limited_by(model)}; at most {left} more fit."
        )
    return max_tokens


def _limited_by(model: Model) -> str:
    if model.context >= model.args.max_position_embeddings:
        return ", by the model's max_position_embeddings"
    return ", for which memory was planned (--context plans for more)"


def _text_tokens(tokenizer: TokenizerWrapper, prompt: str, raw: bool) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("[prompt] the prompt is not valid UTF-8.") from None
    if raw or not tokenizer.has_chat_template:
        # If verbose, transformers would warn of a prompt that `encode` refuses anyway.
        with foreign("[prompt] the tokenizer does not take it"):
            return list(tokenizer.encode(prompt, verbose=False))
    return chat.render(tokenizer, [{"role": "user", "content": prompt}])


def _listed(prompt: object, vocabulary: int) -> list[int]:
    if isinstance(prompt, mx.array):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise ValueError(
            f"[prompt] a prompt is a text, messages or a list of tokens, found {show(prompt)}."
        )
    for i, token in enumerate(prompt):
        known = isinstance(token, Integral) and not isinstance(token, bool)  # NumPy's count too
        if not known or not 0 <= token < vocabulary:
            raise ValueError(
                f"[prompt] token {i} is {show(token)}, expected an integer from 0 to"
                f" {vocabulary - 1}."
            )
    return [int(token) for token in prompt]
