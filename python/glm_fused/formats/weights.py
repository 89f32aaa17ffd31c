"""MLX's quantized weight formats: their sizes, and which one a matrix was packed with."""

from dataclasses import dataclass
from typing import Any

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
