"""The checkpoint's tokenizer: transformers reads its files, mlx-lm puts text together with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.folder import Checkpoint
from ..foreign import ENDS, failed, foreign
from .gguf_tokenizer import write_tokenizer


def load_tokenizer(
    checkpoint: Checkpoint, options: Mapping[str, Any] | None = None
) -> TokenizerWrapper:
    """The tokenizer in the checkpoint's folder or GGUF file, with its stop tokens.

    ``options`` are transformers' own, as mlx-lm's ``tokenizer_config``.

    Raises ValueError, naming the folder or file and what is wrong, for one that does not load. The
    tokenizer raises it later for a token that it has no text for.
    """
    if checkpoint.metadata is None:
        return _load(checkpoint, checkpoint.path, options)
    with TemporaryDirectory() as name:
        write_tokenizer(checkpoint.path, checkpoint.metadata, Path(name))
        tokenizer = _load(checkpoint, Path(name), options)
    tokenizer._tokenizer.name_or_path = str(checkpoint.path)
    return tokenizer


def _load(
    checkpoint: Checkpoint, folder: Path, options: Mapping[str, Any] | None
) -> TokenizerWrapper:
    eos = checkpoint.config.get("eos_token_id")
    with foreign(f"[tokenizer] the tokenizer in {checkpoint.path} does not load"):
        found = utils.load_tokenizer(folder, dict(options or {}), eos_token_ids=eos)
        tokenizer = cast(TokenizerWrapper, found)
        _guard(tokenizer._detokenizer, checkpoint.path)
    return tokenizer


def _guard(detokenizer: Any, path: Path) -> None:
    """Have the detokenizer name the token that it fails at.

    mlx-lm looks tokens up in a list. A vocabulary with gaps gives a None there, and a model with
    more tokens than its tokenizer an IndexError.
    """
    kind: Any = type(detokenizer)
    add_token = kind.add_token

    class Guarded(kind):  # type: ignore[misc]
        def add_token(self, token: int) -> None:  # for each token, so without `foreign`
            try:
                add_token(self, token)
            except ENDS:
                raise
            except BaseException as error:
                what = f"[tokenizer] the tokenizer in {path} has no text for token {token}"
                raise failed(what, error) from error

        def finalize(self) -> None:
            with foreign(f"[tokenizer] the tokenizer in {path} cannot end a text"):
                super().finalize()

    detokenizer.__class__ = Guarded
