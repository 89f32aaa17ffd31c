"""Metal compute shaders, compiled and run on a Linux CPU, with a tracer for their mistakes."""

from pathlib import Path

from .kernels import Argument, FunctionConstant
from .library import Kernel, LaunchError, Library, compile
from .report import Finding, Report, Traffic
from .toolchain import CompileError

__all__ = [
    "Argument",
    "CompileError",
    "Finding",
    "FunctionConstant",
    "Kernel",
    "LaunchError",
    "Library",
    "Report",
    "Traffic",
    "compile",
    "mlx_include",
]


def mlx_include() -> Path:
    """The include directory of the installed MLX, which has its Metal kernels' headers."""
    import mlx.core as mx

    return Path(mx.__file__).parent / "include"
