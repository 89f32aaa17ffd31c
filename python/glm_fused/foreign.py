"""Calls of other people's code on untrusted files: whatever they raise becomes one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError

ENDS = (KeyboardInterrupt, SystemExit)  # what passes through, as nobody's failure
_LONGEST = 300  # how many characters of somebody else's message are shown


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Within the block, every failure becomes a ValueError: ``what``, a colon and what it said.

    Only calls into transformers, tokenizers and jinja belong in it, so that a fault of this package
    stays apart from what a file makes of them.
    """
    try:
        yield
    except ENDS:
        raise
    except BaseException as error:  # a panic in the Rust of tokenizers is no Exception
        raise failed(what, error) from error


def failed(what: str, error: BaseException) -> ValueError:
    """The error of a `foreign` block, for code that runs too often to be in one."""
    return ValueError(f"{what}: {said(error)}")


def said(error: BaseException) -> str:
    """What an error says in one line, with its type where the text alone would not tell."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    if not text:
        return kind
    plain = isinstance(error, (OSError, ValueError, TemplateError))
    return text if plain else f"{kind}: {text}"
