"""Runs the cases of one kind, and says on a pipe of its own which has begun and how it ended."""

import json
import os
import sys
import time
from pathlib import Path

from .harness import FAULTS, Unclear, Wrong, clear_error, load_kind, send, setting


def judge(case, seed, folder):
    """Run a case; returns its outcome and what is to be said about it."""
    try:
        text = case(seed, folder)
    except Wrong as error:
        return "wrong", str(error)
    except Unclear as error:
        return "traceback", str(error)
    except Exception as error:
        text = clear_error(error)
        if text is None:
            return "traceback", f"{type(error).__name__}: {error}{_where(error)}"
        return "clear error", text
    if text == "right":
        return "right", ""
    if not str(text).startswith("error: "):
        return "wrong", f"a case must return right or error: ..., returned {text!r}"
    return "clear error", text.removeprefix("error: ")


def _where(error):
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    return f" ({at.tb_frame.f_code.co_filename}:{at.tb_lineno})"


def run(kind, seeds, folder, pipe, end, **marks):
    """Run cases until the time `end`; returns the outcome of each."""
    for seed in seeds:
        if time.monotonic() > end:
            return
        send(pipe, begin=seed, **marks)
        outcome, detail = judge(kind.case, seed, folder)
        detail = detail.replace(str(folder), "<folder>")[:1000]
        send(pipe, end=seed, outcome=outcome, detail=detail, **marks)
        yield outcome


def main():
    """Do one piece of work, which is given as JSON."""
    task = json.loads(sys.argv[1])
    folder = Path(task["folder"])
    kind = load_kind(task["kind"])
    variables = kind.environment(folder) if hasattr(kind, "environment") else {}
    if any(os.environ.get(name) != value for name, value in variables.items()):
        os.environ.update(variables)  # only a new program takes LD_PRELOAD and the like
        arguments = ["-X", "faulthandler", "-m", "tests.adversarial.worker", sys.argv[1]]
        os.execv(sys.executable, [sys.executable, *arguments])
    pipe = os.fdopen(task["pipe"], "wb")
    kind.prepare(folder)
    send(pipe, ready=setting(kind, "TIMEOUT"))
    end = time.monotonic() + task["seconds"]
    for _ in run(kind, range(*task["seeds"]), folder, pipe, end):
        pass
    if task["planted"]:
        with kind.planted():
            for outcome in run(kind, range(task["planted"]), folder, pipe, end + 60, planted=True):
                if outcome in FAULTS:
                    break
    send(pipe, done=True)


if __name__ == "__main__":
    main()
