"""Keeps mlx-lm's server alive: it has one thread that generates, and an error there ends it."""

from __future__ import annotations

from typing import Any

from mlx_lm.server import ResponseGenerator

from ..generation.prompts import encode, room
from ..models.decoder import Model


def limit_requests() -> None:
    """Have the server refuse requests that do not fit the model, as it refuses malformed ones.

    The model raises where a context overflows, which would end the server for everybody.
    """
    stock = ResponseGenerator._tokenize

    def tokenize(server: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        result = stock(server, tokenizer, request, args)
        model = server.model_provider.model
        if isinstance(model, Model):
            tokens = encode(model, tokenizer, result[0])
            room(model, len(tokens), args.max_tokens)
        return result

    ResponseGenerator._tokenize = tokenize  # type: ignore[method-assign]
