from __future__ import annotations


class MacOSBuildError(Exception):
    """The macOS wheel cannot be built, or would not load on a Mac; the message says why."""
