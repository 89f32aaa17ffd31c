"""Attacks on the package that stay: each case must end in the right result or one clear error."""

import sys
from pathlib import Path

# Kinds of fault make their fixtures with tests/conftest.py and other modules beside it.
if (_tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.append(_tests)
