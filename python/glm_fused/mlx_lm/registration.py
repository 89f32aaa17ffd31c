"""Makes stock mlx-lm use this package's models and its strict loader."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx_lm.convert
import mlx_lm.generate  # the module: its name in the package is a function
import mlx_lm.models
import mlx_lm.utils

from ..checkpoint.folder import Checkpoint
from ..checkpoint.paths import GGUF
from ..checkpoint.safetensors_header import read_header
from ..engine import Engine
from ..engine_options import EngineOptions
from ..generation.tokenizer import load_tokenizer
from ..models.config import ARGS_CLASSES
from ..models.decoder import Model
from ..streaming.model import StreamedModel

# The options that mlx-lm ignores for caches like ours, and what to do instead.
UNSUPPORTED = {
    "kv_bits": "is for caches of other models; --kv-format int8 or fp8 makes this one's small",
    "max_kv_size": "would forget keys that sparse attention may select; leave it out",
}


@dataclass
class Loading:
    """How ``mlx_lm.load`` loads this package's models in this process.

    Attributes:
        options: how the engine loads them.
        given: options on the command line that only this package's models take.
        unsupported: mlx-lm's options on the command line that these models do not take, with their
            values.
        refusal: why the command does not work on these models, or None.
        only_mlx_formats: have weights in formats that MLX does not know become dense, since the
            command reads them itself.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    given: list[str] = field(default_factory=list)
    unsupported: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    only_mlx_formats: bool = False


_loading = Loading()
_streamed: weakref.ref[Model] | None = None
_stock_load_model, _stock_load_adapters = mlx_lm.utils.load_model, mlx_lm.utils.load_adapters
_stock_load_tokenizer = mlx_lm.utils.load_tokenizer
_generate = sys.modules["mlx_lm.generate"]
_convert = sys.modules["mlx_lm.convert"]
_stock_recipe = _convert.mixed_quant_predicate_builder
_stock_steps = {
    name: getattr(_generate, name) for name in ("generate_step", "speculative_generate_step")
}


def register(loading: Loading | None = None) -> None:
    """Have ``mlx_lm`` load ``glm_moe_dsa`` and ``deepseek_v32`` as this package's models.

    A GGUF file, or a folder that holds one and no config.json, is one of them.
    Other model types go on through stock code. Loading follows ``loading`` and is strict: it
    raises what `glm_fused.Engine` raises. Options that caches of these models do not take
    (``kv_bits``, ``max_kv_size``) raise ValueError instead of being ignored.
    """
    global _loading
    _loading = loading or Loading()
    for model_type, args_class in ARGS_CLASSES.items():
        name = f"{mlx_lm.models.__name__}.{model_type}"
        module = ModuleType(name, f"glm_fused's {model_type}")
        module.Model, module.ModelArgs = Model, args_class  # type: ignore[attr-defined]
        sys.modules[name] = module
        setattr(mlx_lm.models, model_type, module)
    setattr(mlx_lm.utils, "load_model", _load_model)  # noqa: B010  mypy knows its exact type
    setattr(mlx_lm.utils, "load_adapters", _load_adapters)  # noqa: B010
    setattr(mlx_lm.utils, "load_tokenizer", _load_tokenizer)  # noqa: B010
    setattr(_convert, "mixed_quant_predicate_builder", _recipe)  # noqa: B010
    for name, stock in _stock_steps.items():
        setattr(_generate, name, _refusing(stock))


def _load_model(
    model_path: Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    **stock: Any,
) -> tuple[Any, dict[str, Any]]:
    """``mlx_lm.utils.load_model``, through `glm_fused.Engine` where the model is ours."""
    path = Path(model_path)
    model_type = _model_type(path)
    if model_type not in ARGS_CLASSES or "get_model_classes" in stock:
        if _loading.given:
            raise ValueError(
                f"[mlx_lm] {path} is {model_type!r}, but {', '.join(_loading.given)} is for"
                f" {' and '.join(ARGS_CLASSES)} only."
            )
        loaded: tuple[Any, dict[str, Any]] = _stock_load_model(
            path, lazy, strict, model_config, **stock
        )
        return loaded
    _check_options(path, strict, model_config or {})
    engine = Engine(
        path,
        _loading.options,
        lazy=lazy,
        tokenizer=False,  # mlx-lm has its own
        only_mlx_formats=_loading.only_mlx_formats,
        compile_kernels=not lazy,  # who loads lazily wants the weights
    )
    if engine.streaming is not None:
        _remember(engine.model)
        print(engine.streaming.plan.format(), file=sys.stderr)
    return engine.model, engine.config | (model_config or {})


def _load_tokenizer(
    model_path: Any,
    tokenizer_config_extra: Mapping[str, Any] | None = None,
    eos_token_ids: Any = None,
) -> Any:
    """``mlx_lm.utils.load_tokenizer``, or the tokenizer in a GGUF file."""
    if not _is_gguf(Path(model_path)):
        return _stock_load_tokenizer(model_path, tokenizer_config_extra, eos_token_ids)
    return load_tokenizer(Checkpoint.open(model_path), tokenizer_config_extra)


def _is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file or of a folder that stands for one."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob(f"*{GGUF}"))
    return path.is_file()


def _load_adapters(model: Any, adapter_path: str) -> Any:
    """``mlx_lm.utils.load_adapters``, except that adapters of streamed experts are one error."""
    if isinstance(model, StreamedModel):
        file = Path(adapter_path) / "adapters.safetensors"
        if file.is_file() and any(".switch_mlp." in name for name in read_header(file)):
            raise ValueError(
                f"[mlx_lm] {file} adapts routed experts, which are streamed; fuse it into the"
                " model, or leave streaming out."
            )
    return _stock_load_adapters(model, adapter_path)


def _model_type(path: Path) -> str:
    if _is_gguf(path):
        return str(Checkpoint.open(path).config["model_type"])
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"[mlx_lm] {path} has no config.json; is it a model's folder?")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[mlx_lm] {file} is not JSON: {error}.") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"[mlx_lm] {file} has no model_type.")
    return found


def _check_options(path: Path, strict: bool, model_config: Mapping[str, Any]) -> None:
    if _loading.refusal is not None:
        raise ValueError(f"[mlx_lm] {path}: {_loading.refusal}.")
    if not strict:
        raise ValueError(
            f"[mlx_lm] {path}: models of this type run in one process; start without mlx.launch."
        )
    for name, value in _loading.unsupported.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"[mlx_lm] {flag} {value} {UNSUPPORTED[name]}.")
    for key, value in model_config.items():
        if value:
            raise ValueError(f"[mlx_lm] models of this type do not take {key}={value!r}.")
    if _loading.options.stream_options() is not None:
        gc.collect()
        if _streamed is not None and _streamed() is not None:
            raise ValueError(f"[mlx_lm] {path}: one streamed model at a time fits the budget.")


def _recipe(name: str, model: Any, *arguments: Any) -> Callable[[str, Any], Any]:
    """The ``--quant-predicate`` of ``mlx_lm.convert``, except for what the model keeps as it is."""
    chosen = _stock_recipe(name, model, *arguments)
    if not isinstance(model, Model):
        return chosen  # type: ignore[no-any-return]
    kept = model.quant_predicate
    return lambda path, module: kept(path, module) and chosen(path, module)


def _remember(model: Model) -> None:
    global _streamed
    _streamed = weakref.ref(model)


def _refusing(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A generator of ``mlx_lm.generate`` that refuses what caches of our models do not take."""

    def steps(prompt: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, Model):
            for name, advice in UNSUPPORTED.items():
                if kwargs.get(name) is not None:
                    raise ValueError(f"[mlx_lm] {name}={kwargs[name]} {advice}.")
        return stock(prompt, model, *args, **kwargs)

    return steps
