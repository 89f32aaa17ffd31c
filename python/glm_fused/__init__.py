"""GLM-5 (`glm_moe_dsa`) on MLX with fused decode kernels, checked bit for bit.

An engine loads a checkpoint and continues prompts:

    with glm_fused.Engine("demo") as engine:  # or the folder of a checkpoint
        print(engine.generate("def main():", max_tokens=40).text)
"""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING
from typing import Any as _Any

from . import _abi as _abi  # goes first, so that an extension that does not fit is a clear error
from . import ops
from ._ext import num_threads, set_num_threads
from .ops.paths import reference_path

if TYPE_CHECKING:
    from .engine import Engine
    from .engine_options import EngineOptions
    from .generation.generate import generate, stream_generate
    from .loader import load, load_model
    from .streaming.options import StreamOptions

__version__ = _metadata.version("glm-fused")

__all__ = [
    "Engine",
    "EngineOptions",
    "StreamOptions",
    "__version__",
    "generate",
    "load",
    "load_model",
    "num_threads",
    "ops",
    "reference_path",
    "set_num_threads",
    "stream_generate",
]

# mlx-lm takes seconds to import, which the kernels and the command line's help do not need.
_LAZY = {
    "Engine": "engine",
    "EngineOptions": "engine_options",
    "StreamOptions": "streaming.options",
    "generate": "generation.generate",
    "load": "loader",
    "load_model": "loader",
    "stream_generate": "generation.generate",
}


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
