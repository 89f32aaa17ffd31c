"""Quantized weight formats and what a config says about them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..validation import show

GROUP_SIZES = {"affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Format:
    """One of MLX's quantized layouts."""

    mode: str
    bits: int
    group_size: int

    @property
    def bits_per_weight(self) -> float:
        """With scales and biases, for 16-bit affine scales."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def __str__(self) -> str:
        return f"affine-{self.bits} g{self.group_size}" if self.mode == "affine" else self.mode

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of ``mx.quantize`` and ``to_quantized``."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


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


def infer_format(
    name: str, columns: int, packed: int, groups: int, scales_are_uint8: bool
) -> Format:
    """The format that a matrix of ``columns`` inputs was packed with, from the shapes stored.

    ``packed`` counts uint32 words a row, ``groups`` scales a row. Raises ValueError, naming the
    module ``name``, if no format gives them.
    """
    for mode, group_sizes in GROUP_SIZES.items():
        if scales_are_uint8 == (mode == "affine"):
            continue
        for bits in BITS[mode]:
            for group in group_sizes:
                if packed * 32 == columns * bits and groups * group == columns:
                    return Format(mode, bits, group)
    scales = "uint8" if scales_are_uint8 else "float"
    raise ValueError(
        f"[weights] {name}: no quantization packs rows of {columns} into {packed} words and"
        f" {groups} {scales} scales."
    )


class Declaration(Protocol):
    """What a config says of a checkpoint's modules."""

    def declared(self, path: str) -> tuple[Format | None, bool]:
        """The format for a module, None if it is dense, and whether an entry names the module."""


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
