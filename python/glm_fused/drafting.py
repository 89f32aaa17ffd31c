"""What makes an engine's drafts: found in its checkpoint, or loaded beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint.checked import holds_mtp
from .checkpoint.folder import Checkpoint
from .checkpoint.paths import checkpoint_path
from .engine_options import EngineOptions
from .foreign import foreign
from .generation.drafts.options import DraftOptions
from .generation.limits import LOOKUP, MIXED, MTP, OFF
from .loader import load
from .models.config import ARGS_CLASSES
from .models.decoder import Model


def draft_source(options: EngineOptions, path: Path) -> str | None:
    """What is to make drafts for the checkpoint at ``path``; None where nothing is."""
    if options.draft == OFF:
        return None
    if options.draft_from is not None:
        return os.fspath(options.draft_from)
    return MIXED if holds_mtp(Checkpoint.open(path)) else LOOKUP


def draft_options(
    depth: int | str, source: str, model: Model, tokenizer: TokenizerWrapper | None
) -> DraftOptions:
    """The options of drafts, with the small model loaded where ``source`` is the path of one.

    Raises FileNotFoundError for a path of nothing, and ValueError, naming the path, for a model
    that does not load or has another vocabulary.
    """
    if source in (MTP, LOOKUP, MIXED):
        return DraftOptions(depth, source)
    path = checkpoint_path(source)
    small, its_tokenizer = _load(path)
    known, found = model.args.vocab_size, _vocabulary(small)
    if found < known:
        raise ValueError(f"[drafts] {path} knows {found} tokens, expected the model's {known}.")
    if tokenizer is not None and its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"[drafts] the tokenizer of {path} has another vocabulary, expected the model's own."
        )
    return DraftOptions(depth, source, small)


def _load(path: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """A model of this package or of mlx-lm's, and its tokenizer."""
    config = path / "config.json"
    ours = not path.is_dir() or json.loads(config.read_bytes()).get("model_type") in ARGS_CLASSES
    if ours:
        return load(path)
    with foreign(f"[drafts] {path} does not load"):
        return mlx_lm.utils.load(str(path))[:2]


def _vocabulary(model: nn.Module) -> int:
    args: Any = getattr(model, "args", None)
    args = getattr(args, "text_config", None) or args
    return int(args["vocab_size"] if isinstance(args, dict) else args.vocab_size)
