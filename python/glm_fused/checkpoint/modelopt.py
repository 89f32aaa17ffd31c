"""Configs of modelopt: NVFP4 with a factor a matrix; the tensors say which modules are packed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..formats.weights import FORMATS, Format
from ..validation import show
from .safetensors_header import quoted

METHOD = "modelopt"
ALGORITHM = "NVFP4"
NVFP4 = FORMATS["nvfp4-global"]


@dataclass(frozen=True)
class ModelOpt:
    """Every module may be packed as NVFP4 or be dense.

    The config's lists of modules (``ignore``, ``exclude_modules``) are not read: published ones
    name modules that do not exist and leave out dense ones, so a list proves nothing that the
    tensors do not.
    """

    def declared(self, path: str) -> tuple[Format | None, bool]:
        """NVFP4 for every module, and False: no entry names the module."""
        return NVFP4, False


def parse(key: str, entry: Mapping[str, Any]) -> ModelOpt:
    """The declaration in a ``quantization_config``, or in what hf_quant_config.json holds.

    Raises ValueError, naming the entry, for algorithms other than NVFP4 and for other groups than
    those of 16 values. How the config would have caches quantized (``kv_cache_scheme``) is a hint
    and not followed.
    """
    if (found := entry.get("quant_algo")) != ALGORITHM:
        raise ValueError(
            f"[config] {key}: quant_method {METHOD!r} with quant_algo {show(found)}, expected"
            f" {ALGORITHM!r}; load a checkpoint of that or of another method."
        )
    _check(f"{key}.group_size", entry.get("group_size"), NVFP4.group_size)
    groups = entry.get("config_groups")
    if groups is None:
        return ModelOpt()
    if not isinstance(groups, Mapping):
        raise ValueError(f"[config] {key}.config_groups must be an object, found {show(groups)}.")
    for name, group in groups.items():
        where = f"{key}.config_groups[{quoted(name)}]"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ValueError(
                f"[config] {where} must be an object with weights, found {show(group)}."
            )
        _check(f"{where}.weights.type", weights.get("type"), "float")
        _check(f"{where}.weights.num_bits", weights.get("num_bits"), NVFP4.bits)
        _check(f"{where}.weights.group_size", weights.get("group_size"), NVFP4.group_size)
    return ModelOpt()


def _check(where: str, found: object, expected: object) -> None:
    """Raise ValueError unless an entry is as expected, or missing."""
    if found is not None and (type(found) is not type(expected) or found != expected):
        raise ValueError(f"[config] {where} is {show(found)}, expected {expected!r}.")
