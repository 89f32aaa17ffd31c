"""Every way in which a case may end, to test the harness with; it is no fault of the package."""

import json
import os
import signal
import time
from contextlib import contextmanager

from tests.adversarial.harness import Unclear, Wrong

TIMEOUT = 1.0
_state = {"planted": False}


def prepare(folder):
    """Nothing is needed."""


def _wrong():
    raise Wrong("3, expected 4")


def _die():
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang():
    time.sleep(60)


def _bare():
    return {}["tensor"]


def _python_s_own():
    return json.loads("{")


def _clear():
    raise ValueError("[ops] x must be float32 but is int8.")


def _unclear():
    raise Unclear("exit code 1: 'Traceback ...'")


def _leave():
    os._exit(3)


WAYS = [
    lambda: "right",
    _wrong,
    _die,
    _clear,
    lambda: "error: [cli] --model names no folder.",
    _hang,
    _bare,
    _python_s_own,
    _unclear,
    _leave,
    lambda: None,
    lambda: "right",
]


def case(seed, folder):
    """End in one of the ways."""
    # The driver does not take what is printed for a record, which comes on a pipe.
    print('{"end": 7, "outcome": "right", "detail": ""}', flush=True)
    if _state["planted"] and seed == 2:
        return _wrong()
    return "right" if _state["planted"] else WAYS[seed % len(WAYS)]()


@contextmanager
def planted():
    """The third case goes wrong."""
    _state["planted"] = True
    yield
