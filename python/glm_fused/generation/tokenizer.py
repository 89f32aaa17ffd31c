"""The checkpoint's tokenizer: transformers reads its files, mlx-lm puts text together with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.folder import Checkpoint
from ..foreign import foreign


def load_tokenizer(checkpoint: Checkpoint) -> TokenizerWrapper:
    """The tokenizer in the checkpoint's folder, with its stop tokens.

    Raises ValueError, naming the folder and what is wrong, for files that do not load. The
    tokenizer raises it later for a token that it has no text for.
    """
    eos = checkpoint.config.get("eos_token_id")
    with foreign(f"[tokenizer] the tokenizer in {checkpoint.path} does not load"):
        tokenizer = cast(TokenizerWrapper, utils.load_tokenizer(checkpoint.path, eos_token_ids=eos))
        _guard(tokenizer._detokenizer, checkpoint.path)
    return tokenizer


def _guard(detokenizer: Any, folder: Path) -> None:
    """Have the detokenizer name the token that it fails at.

    mlx-lm looks tokens up in a list. A vocabulary with gaps gives a None there, and a model with
    more tokens than its tokenizer an IndexError.
    """
    kind: Any = type(detokenizer)

    class Guarded(kind):  # type: ignore[misc]
        def add_token(self, token: int) -> None:
            with foreign(f"[tokenizer] the tokenizer in {folder} has no text for token {token}"):
                super().add_token(token)

        def finalize(self) -> None:
            with foreign(f"[tokenizer] the tokenizer in {folder} cannot end a text"):
                super().finalize()

    detokenizer.__class__ = Guarded
