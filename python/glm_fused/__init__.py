"""GLM-5 (`glm_moe_dsa`) on MLX with fused decode kernels, checked bit for bit."""

from importlib import metadata

from . import _abi as _abi  # first: a clear error where the extension does not fit
from . import ops
from ._ext import num_threads, set_num_threads
from .loader import load, load_model
from .paths import reference_path

__version__ = metadata.version("glm-fused")

__all__ = [
    "load",
    "load_model",
    "num_threads",
    "ops",
    "reference_path",
    "set_num_threads",
]
