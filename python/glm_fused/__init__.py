"""GLM-5 (`glm_moe_dsa`) on MLX with fused decode kernels, checked bit for bit."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

from . import _abi as _abi  # first: a clear error where the extension does not fit
from . import ops
from ._ext import num_threads, set_num_threads
from .paths import reference_path

if TYPE_CHECKING:
    from .loader import load, load_model

__version__ = metadata.version("glm-fused")

__all__ = [
    "load",
    "load_model",
    "num_threads",
    "ops",
    "reference_path",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    # mlx-lm takes seconds to import, which the kernels and the command line's help do not need.
    if name in ("load", "load_model"):
        from . import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
