"""Run the ``glm-fused`` command as ``python -m glm_fused``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
