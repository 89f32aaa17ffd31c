"""What an MTP layer learns from: text, and the bundled model's own hidden states over it.

Text is of two kinds: the standard library's source, and what the model itself makes of beginnings
of it, since drafts are made for that. Its states come from `glm_fused`, as users run the model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from corpus import SourceFile
from numpy.typing import NDArray

from glm_fused.host import to_numpy

LENGTH = 513  # tokens of a piece of text
AT_ONCE = 16  # pieces that are generated together
PROMPT = 64  # tokens of a piece before those that the model makes


@dataclass(frozen=True)
class States:
    """Pieces of text and their states.

    Attributes:
        tokens: int16 [n, LENGTH].
        hidden: the bits of bfloat16 [n, LENGTH, hidden], normed, as uint16.
    """

    tokens: NDArray[np.int16]
    hidden: NDArray[np.uint16]

    def save(self, file: Path) -> None:
        """Write both; an interruption leaves no file."""
        new = file.with_suffix(".new.npz")
        np.savez(new, tokens=self.tokens, hidden=self.hidden)
        new.replace(file)

    @classmethod
    def joined(cls, parts: Iterable[States]) -> States:
        """All parts in one."""
        found = list(parts)
        return cls(
            np.concatenate([part.tokens for part in found]),
            np.concatenate([part.hidden for part in found]),
        )

    @classmethod
    def load(cls, file: Path) -> States:
        """What `save` wrote."""
        with np.load(file) as arrays:
            return cls(arrays["tokens"], arrays["hidden"])


def pieces(tokenizer: Any, files: list[SourceFile], seed: int) -> Iterator[list[int]]:
    """Pieces of LENGTH tokens of the files, each file opened by the end-of-text token."""
    order = random.Random(seed).sample(files, len(files))
    stream: list[int] = []
    for file in order:
        stream += [tokenizer.eos_token_id, *tokenizer.encode(file.text, add_special_tokens=False)]
        while len(stream) >= LENGTH:
            yield stream[:LENGTH]
            stream = stream[LENGTH:]


def continued(model: Any, texts: NDArray[np.int16]) -> NDArray[np.int16]:
    """The first PROMPT tokens of texts, and what the model makes of them: [b, LENGTH]."""
    cache, tokens = model.make_cache(), mx.array(texts[:, :PROMPT].astype(np.int32))
    found = [tokens]
    for _ in range(LENGTH - PROMPT):
        tokens = mx.argmax(model(tokens, cache)[:, -1:], axis=-1)
        mx.async_eval(tokens)
        found.append(tokens)
    return to_numpy(mx.concatenate(found, axis=1).astype(mx.int16))


def make_states(
    model: Any, tokenizer: Any, files: list[SourceFile], own: int, seed: int
) -> Iterator[States]:
    """States of AT_ONCE pieces at a time; ``own`` in four times what the model made of them."""
    texts = pieces(tokenizer, files, seed)
    for number in itertools.count():
        found = list(itertools.islice(texts, AT_ONCE))
        if len(found) < AT_ONCE:
            return
        tokens = to_numpy(mx.array(found, mx.int16))
        if number % 4 < own:
            tokens = continued(model, tokens)
        rows = (mx.array(row[None].astype(np.int32)) for row in tokens)
        hidden = [to_numpy(model.model(row, None, None).view(mx.uint16)) for row in rows]
        yield States(tokens, np.concatenate(hidden))


def drafted(model: Any, states: States, count: int) -> list[NDArray[np.float32]]:
    """Logits [LENGTH - count, vocab] of drafts over the first piece, and [vocab] of two more.

    The first are those of all rows but the last ``count``, by one call; the others, as they are
    when they are used, go on from the last of these, along the piece.
    """
    tokens = mx.array(states.tokens[:1].astype(np.int32))
    hidden = mx.array(states.hidden[:1]).view(mx.bfloat16)
    rows, cache = LENGTH - count, model.make_mtp_cache()
    logits, hidden, selection = model.draft(tokens[:, 1 : rows + 1], hidden[:, :rows], cache)
    found = [logits[0]]
    for at in range(rows + 1, LENGTH)[:2]:
        taken = tokens[:, at : at + 1]
        logits, hidden, selection = model.draft(taken, hidden[:, -1:], cache, selection)
        found.append(logits[0, -1])
    return [to_numpy(part.astype(mx.float32)) for part in found]
