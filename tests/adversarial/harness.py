"""What a kind of fault may raise, and what counts as a clear error."""

import importlib
import json
import pkgutil
import re

from . import kinds

OUTCOMES = ("right", "clear error", "wrong", "crash", "hang", "traceback")
FAULTS = OUTCOMES[2:]

# Python itself says these, which name nothing that a user could mend.
_BARE = re.compile(
    r"list index out of range|not enough values|too many values|could not convert|invalid literal"
    r"|cannot convert|math domain error|^Expecting|Exceeds the limit|not in list|unpack"
    r"|must be real|codec can't|bad_alloc|std::|vector::|basic_string|map::at|stoi|nanobind"
)
# After these words, an error of ours quotes what somebody else's code said of the file it names.
_QUOTED = re.compile(r"(does not load|template in \S+ fails|not take\w*|text for token \d+): .*")


class Wrong(Exception):
    """A case raises this for a wrong token or value, or a fault that passed unnoticed."""


class Unclear(Exception):
    """A case raises this for an error that no user could act on, such as a traceback on stderr."""


def clear_message(text):
    """Whether a message is about as long as a sentence, is one line, and is not Python's own."""
    ours = _QUOTED.sub("", text)
    short = len(text.split()) < 3 or len(text) >= 1000
    return not short and "\n" not in text.strip() and not _BARE.search(ours)


def clear_error(error):
    """The message of an exception that the package documents, or None for any other."""
    kind = type(error)
    documented = kind in (ValueError, RuntimeError, MemoryError, ImportError) or isinstance(
        error, OSError | ModuleNotFoundError
    )
    of_package = kind.__module__.startswith("glm_fused")
    text = str(error)
    return text if (documented or of_package) and clear_message(text) else None


def command_outcome(code, out, err):
    """The outcome of a run of the command line; raises `Unclear` for exit codes but 0 and 2.

    Returns "right" for 0, leaving the judgement of what was printed to the caller.
    """
    if code == 0:
        return "right"
    lines = err.strip().splitlines()
    if code != 2 or not lines or "Traceback" in err or not clear_message(lines[-1]):
        raise Unclear(f"exit code {code}: {err.strip()[-300:]!r}")
    return f"error: {lines[-1]}"


def kind_names():
    """The names of all kinds, in alphabetical order."""
    return sorted(m.name for m in pkgutil.iter_modules(kinds.__path__) if m.name[0] != "_")


def load_kind(name):
    """The module of a kind."""
    return importlib.import_module(f"{kinds.__name__}.{name}")


def unavailable(name):
    """Why a kind cannot run on this machine, or ""."""
    return getattr(load_kind(name), "unavailable", str)()


_SETTINGS = {"TIMEOUT": 30.0, "PIECE": 2500, "QUICK_CASES": 40, "SLOW_CASES": 5000}


def setting(kind, name):
    """A kind's own setting, or the default one (README.md lists them)."""
    return getattr(kind, name, _SETTINGS[name])


def send(pipe, **record):
    """Write one record to the driver, at once."""
    pipe.write((json.dumps(record) + "\n").encode())
    pipe.flush()
