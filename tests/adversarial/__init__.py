"""Attacks on the package, kept: every case must end in the right result or in one clear error."""

import sys
from pathlib import Path

# Kinds of fault make their fixtures with tests/conftest.py and its like.
if (_tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.append(_tests)
