"""Tokens on their way into the model: of the right kind, in the vocabulary, within the context."""

import mlx.core as mx
import mlx.nn as nn

from .. import _ext


def check_tokens(tokens: mx.array) -> None:
    """Refuse, with a ValueError, what is not an integer array [batch, length] with entries."""
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        found = getattr(tokens, "dtype", type(tokens).__name__)
        raise ValueError(f"[model] tokens must be an integer mx.array, got {found}.")
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"[model] tokens must be [batch, length], not empty, got {tokens.shape}.")


def check_length(cached: int, new: int, context: int) -> None:
    """Refuse, with a ValueError, a forward that ends beyond the model's context."""
    if cached + new > context:
        raise ValueError(
            f"[model] {cached} cached and {new} new tokens, expected at most {context}, the model's"
            " context (max_position_embeddings)."
        )


def embed(embedding: nn.Module, tokens: mx.array, vocabulary: int) -> mx.array:
    """The rows [b, l, hidden] of integer tokens [b, l].

    Raises ValueError for a token outside the vocabulary; where tokens are not evaluated yet, when
    the result is evaluated on the CPU. A GPU cannot raise, and gives NaN.
    """
    if mx.default_device() == mx.gpu:
        tokens = tokens.astype(mx.int64)  # int64 can hold the vocabulary's size
        inside = (tokens >= 0) & (tokens < vocabulary)
        rows: mx.array = embedding(mx.where(inside, tokens, 0))
        return mx.where(inside[..., None], rows, mx.nan)
    return embedding(_ext.check_tokens(tokens, vocabulary))  # type: ignore[no-any-return]
