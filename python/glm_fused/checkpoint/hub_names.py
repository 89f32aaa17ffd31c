"""Names of the Hub's models, and how to tell them from paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from .paths import DEMO, GGUF

FORM = "ORG/NAME[@REVISION][:VARIANT]"
_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^\s@:]+))?(?::(?P<variant>[\w.-]+))?",
    re.ASCII,
)


class HubName(NamedTuple):
    """The model of a repository, maybe at one revision; a variant is one of several in GGUF."""

    repository: str
    revision: str | None = None
    variant: str | None = None

    @property
    def branch(self) -> str:
        """The revision that is meant: a branch, a tag or a commit."""
        return self.revision or "main"

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{at}" + (f":{self.variant}" if self.variant else "")


def hub_name(text: str | os.PathLike[str]) -> HubName | None:
    """The Hub's model that ``text`` names; None for a path, which is what exists here, and others.

    The name of a GGUF file is a path, even where there is none.
    """
    if not isinstance(text, str) or text == DEMO or text.lower().endswith(GGUF):
        return None
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists():
        return None
    return HubName(**found.groupdict())
