"""What a config says about the formats of its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..formats.weights import BITS, DEFAULTS, FP8_BLOCK, GROUP_SIZES, Format
from ..validation import show
from .safetensors_header import quoted

_KEYS = ("group_size", "bits", "mode")


def parse_format(where: str, entry: Mapping[str, Any]) -> Format:
    """The format of a config entry, MLX's defaults filled in; ValueError names ``where``.

    A group_size of null is MLX's default: ``mlx_lm.convert --quant-predicate`` writes it.
    """
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in BITS:
        raise ValueError(f"[config] {where}: mode {show(mode)}, expected one of {', '.join(BITS)}.")
    default, bits = DEFAULTS[mode]
    group_size, bits = entry.get("group_size"), entry.get("bits", bits)
    group_size = default if group_size is None else group_size
    for key, value, options in (("group_size", group_size, GROUP_SIZES), ("bits", bits, BITS)):
        if type(value) is not int or value not in options[mode]:
            expected = " or ".join(str(option) for option in options[mode])
            raise ValueError(
                f"[config] {where}: {key} {show(value)}, expected {expected} for {mode}."
            )
    return Format(mode, bits, group_size)


@dataclass(frozen=True)
class Quantization:
    """``config["quantization"]``: a default and, by module path, exceptions (None: dense)."""

    default: Format
    overrides: Mapping[str, Format | None]

    def declared(self, path: str) -> tuple[Format | None, bool]:
        """The format for a module and whether its own entry (or its source's) says so."""
        for key in _aliases(path):
            if key in self.overrides:
                return self.overrides[key], True
        return self.default, False


def _aliases(path: str) -> Iterator[str]:
    """Keys that may describe a module: its path in this layout, then in the other one."""
    yield path
    head, _, leaf = path.rpartition(".")
    if leaf in ("embed_q", "unembed_out"):
        yield f"{head}.kv_b_proj"
    if head.endswith(".switch_mlp"):
        yield f"{head.removesuffix('.switch_mlp')}.experts.0.{leaf}"
    elif ".mlp.experts." in head:
        yield f"{head.partition('.mlp.experts.')[0]}.mlp.switch_mlp.{leaf}"


def quantization_from_config(config: Mapping[str, Any]) -> Quantization | None:
    """What the config declares, or None; FP8 block scaling is checked and is no quantization here.

    Raises ValueError for unknown modes or methods and impossible sizes, naming the entry.
    """
    for key in ("quantization", "quantization_config"):
        entry = config.get(key)
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"[config] {key} must be an object, found {show(entry)}.")
        method = entry.get("quant_method")
        if method == "fp8":
            _check_fp8(key, entry)
        elif method in ("mxfp4", "mxfp8"):
            return Quantization(parse_format(key, {"mode": method}), {})
        elif method is not None:
            raise ValueError(
                f"[config] {key}: quant_method {show(method)}, expected fp8, mxfp4 or mxfp8;"
                " convert the checkpoint with mlx_lm.convert."
            )
        else:
            return _parse(key, entry)
    return None


def _parse(key: str, entry: Mapping[str, Any]) -> Quantization:
    default = parse_format(key, entry)
    overrides: dict[str, Format | None] = {}
    for path, value in entry.items():
        where = f"{key}[{quoted(path)}]"
        if path in _KEYS:
            continue
        if isinstance(value, Mapping):
            overrides[path] = parse_format(where, value)
        elif type(value) is bool:
            overrides[path] = default if value else None
        elif "." in path:  # other keys are notes of the tool that wrote the config
            raise ValueError(f"[config] {where} must be an object or false, found {show(value)}.")
    return Quantization(default, overrides)


def _check_fp8(key: str, entry: Mapping[str, Any]) -> None:
    block, fmt = entry.get("weight_block_size"), entry.get("fmt", "e4m3")
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise ValueError(
            f"[config] {key}: weight_block_size {show(block)}, expected [{FP8_BLOCK}, {FP8_BLOCK}]."
        )
    if fmt != "e4m3":
        raise ValueError(f"[config] {key}: fmt {show(fmt)}, expected 'e4m3'.")
