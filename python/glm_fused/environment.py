"""The environment variables that this package reads, and what it says when it is being debugged."""

from __future__ import annotations

import logging
import os

VARIABLES = {
    "GLM_FUSED_REFERENCE": "take the unfused reference path (0, false, off, no: do not)",
    "GLM_FUSED_DEBUG": "say which path each layer takes, and show tracebacks",
    "GLM_FUSED_NUM_THREADS": "threads of the CPU kernels (default: every processor)",
    "GLM_FUSED_KERNELS": "avx512, avx2 or portable, in place of the best one",
    "GLM_FUSED_API_KEY": "what clients of glm-fused serve have to know",
    "GLM_FUSED_METAL_TILES": "rows,gate_up,down,router: for tuning",
}
FALSY = {"", "0", "false", "off", "no"}

logger = logging.getLogger("glm_fused")


def flag(name: str) -> bool:
    """Whether the environment variable ``name`` is set to something other than a falsy word."""
    return os.environ.get(name, "").strip().lower() not in FALSY


def debug(message: str, *args: object) -> None:
    """Say on stderr which path was taken and why, when ``GLM_FUSED_DEBUG`` is set."""
    if flag("GLM_FUSED_DEBUG"):
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.DEBUG)
        logger.debug(message, *args)
