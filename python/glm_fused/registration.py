"""Makes stock mlx-lm use this package's models."""

import sys
from types import ModuleType

import mlx_lm.models

from .config import ARGS_CLASSES
from .model import Model


def register() -> None:
    """Put our modules where ``mlx_lm.load`` looks up ``glm_moe_dsa`` and ``deepseek_v32``."""
    for model_type, args_class in ARGS_CLASSES.items():
        name = f"{mlx_lm.models.__name__}.{model_type}"
        module = ModuleType(name, f"glm_fused's {model_type}")
        module.Model, module.ModelArgs = Model, args_class  # type: ignore[attr-defined]
        sys.modules[name] = module
        setattr(mlx_lm.models, model_type, module)
