"""Text from tokens, up to where it ends: at a stop token, a stop text or the last token."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .stops import StopTexts


class Text:
    """Puts the tokens of one text together.

    Args:
        tokenizer: knows the tokens' texts, and which end a text.
        stop: texts before which it ends.
        max_tokens: tokens after which it ends.
    """

    def __init__(self, tokenizer: TokenizerWrapper, stop: Sequence[str], max_tokens: int):
        self._detokenizer, self._ends = tokenizer.detokenizer, tokenizer.eos_token_ids
        self._stops, self._left = StopTexts(stop), max_tokens

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended the text; None where there was none."""
        return self._stops.found

    def feed(self, token: int) -> tuple[str, str | None]:
        """The text that a token makes ready to be shown, and "stop" or "length" if it is the last.

        A stop token has no text.
        """
        self._left -= 1
        reason = "stop" if token in self._ends else None if self._left else "length"
        if reason != "stop":
            self._detokenizer.add_token(token)
        if reason is not None:
            self._detokenizer.finalize()
        text, stopped = self._stops.feed(self._detokenizer.last_segment)
        if stopped:
            return text, "stop"
        return text if reason is None else text + self._stops.rest(), reason
