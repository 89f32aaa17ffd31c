"""The command line in this process: its exit code and what it printed."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

from glm_fused.cli import main


def run(*arguments, stdin=""):
    """(exit code, stdout, stderr); an exception of `main` goes on to the harness."""
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
