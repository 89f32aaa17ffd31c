"""Load the compiled extension, and refuse clearly when it does not fit the installed mlx."""

from __future__ import annotations

from importlib import metadata

import mlx.core as mx


def check() -> None:
    """Pass an array through the extension.

    Raises:
        ImportError: the extension cannot be loaded, or was built against another mlx or nanobind
            than the ones installed; the message names the versions.
    """
    installed = f"mlx {metadata.version('mlx')} is installed"
    advice = "Reinstall with: pip install --force-reinstall glm-fused"
    try:
        from . import _ext
    except ImportError as error:
        raise ImportError(
            f"glm_fused's compiled extension does not load; {installed}: {error}. {advice}"
        ) from error
    built = f"mlx {_ext.built_with_mlx} and nanobind {_ext.built_with_nanobind}"
    if _ext.built_with_mlx != metadata.version("mlx"):
        raise ImportError(f"glm_fused was built with {built}, but {installed}. {advice}")
    try:
        _ext.probe(mx.array([1.0]))
    except TypeError as error:
        raise ImportError(
            f"glm_fused was built with {built}, but {installed}, which was built with another "
            f"nanobind: arrays cannot pass between them. {advice}"
        ) from error


check()
