"""Tests the extension under sanitizers: ``python -m tests.sanitize address|thread``."""
