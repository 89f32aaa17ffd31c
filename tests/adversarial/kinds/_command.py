"""Runs the command line in this process, and takes its exit code and what it printed."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

from glm_fused.cli import main


def run(*arguments, stdin=""):
    """Run a command; returns exit code, stdout, stderr. Exceptions of `main` go to the harness."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()
