"""The self-test's cases of moe_decode, router_topk and quantized_matvec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..formats.weights import FORMATS, QUANTIZED, Format, dense_format
from .case import Case
from .synthetic import DTYPES

DENSE = None  # stands for floats of the activations' dtype
AFFINE4, MXFP4 = FORMATS["affine4"], FORMATS["mxfp4"]
OURS = [fmt for fmt in FORMATS.values() if fmt.mode != "dense" and fmt not in QUANTIZED]
EACH: tuple[Format | None, ...] = (*QUANTIZED, DENSE)


@dataclass(frozen=True)
class MoeDecode(Case):
    gate: Format | None
    up: Format | None
    down: Format | None
    hidden: int
    intermediate: int
    bank: int = 3
    top_k: int = 2

    op = "moe_decode"

    def label(self) -> str:
        formats = [fmt.name for fmt in self._formats()]
        name = formats[0] if len(set(formats)) == 1 else "+".join(formats)
        return f"{name}-{self.hidden}x{self.intermediate}-top{self.top_k}of{self.bank}"

    def arguments(self) -> dict[str, Any]:
        bits, dtype = self.bits(), DTYPES[self.dtype]
        gate, up, down = self._formats()
        inner = (self.bank, self.intermediate, self.hidden)
        return {
            "x": bits.floats((self.tokens, self.hidden), dtype),
            "gate": bits.weight(inner, gate, dtype),
            "up": bits.weight(inner, up, dtype),
            "down": bits.weight((self.bank, self.hidden, self.intermediate), down, dtype),
            "slots": mx.array(bits.choices(self.tokens, self.top_k, self.bank)),
            "scores": mx.abs(bits.floats((self.tokens, self.top_k), mx.float32, -1)),
        }

    def sizes(self) -> tuple[int, ...]:
        return self.tokens, self.top_k

    def _formats(self) -> list[Format]:
        return [_or_dense(fmt, self.dtype) for fmt in (self.gate, self.up, self.down)]


@dataclass(frozen=True)
class RouterTopk(Case):
    weight_dtype: str
    experts: int
    hidden: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1

    op = "router_topk"

    def label(self) -> str:
        groups = f"-groups{self.topk_group}of{self.n_group}" if self.n_group > 1 else ""
        of = f"top{self.top_k}of{self.experts}{groups}"
        return f"{of}-{self.hidden}-{self.weight_dtype}weight"

    def arguments(self) -> dict[str, Any]:
        bits = self.bits()
        fmt = _or_dense(DENSE, self.weight_dtype)
        weight = bits.weight((self.experts, self.hidden), fmt, DTYPES[self.weight_dtype])
        return {
            "x": bits.floats((self.tokens, self.hidden), DTYPES[self.dtype]),
            "weight": weight.planes[0],
            "correction_bias": bits.floats((self.experts,), mx.float32, -3),
            "top_k": self.top_k,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "routed_scaling_factor": 2.5,
        }

    def sizes(self) -> tuple[int, ...]:
        return (self.experts,)


@dataclass(frozen=True)
class QuantizedMatvec(Case):
    fmt: Format | None
    n: int
    k: int

    op = "quantized_matvec"
    has_metal_kernel = False  # a GPU runs stock MLX

    def label(self) -> str:
        return f"{_or_dense(self.fmt, self.dtype).name}-{self.n}x{self.k}"

    def arguments(self) -> dict[str, Any]:
        bits, dtype = self.bits(), DTYPES[self.dtype]
        return {
            "x": bits.floats((self.tokens, self.k), dtype),
            "w": bits.weight((self.n, self.k), _or_dense(self.fmt, self.dtype), dtype),
        }


def _or_dense(fmt: Format | None, dtype: str) -> Format:
    return dense_format(DTYPES[dtype]) if fmt is None else fmt


def _by_format(dtypes_each: int) -> list[Case]:
    """A case per format at sizes for MLX's fast order, in one or more activation dtypes."""
    names = list(DTYPES)
    return [
        MoeDecode(names[(i + j) % 3], (1, 2, 5, 16)[(i + j) % 4], fmt, fmt, fmt, 512, 512)
        for i, fmt in enumerate(EACH)
        for j in range(dtypes_each)
    ]


def _odd_sizes() -> list[Case]:
    """A case per format at sizes for MLX's general order, with odd numbers of rows."""
    made: list[Case] = []
    for i, fmt in enumerate(EACH):
        dtypes, tokens = [list(DTYPES)[(i + j) % 3] for j in range(2)], (1, 2, 5)[i % 3]
        made.append(MoeDecode(dtypes[0], tokens, fmt, fmt, DENSE, 384, 45))
        made.append(MoeDecode(dtypes[1], tokens, DENSE, DENSE, fmt, 77, 384))
    return made


def _shapes() -> list[Case]:
    """Cases of every token count in one format, mixed formats, odd sizes and GLM-5's own shape."""
    mixed = (AFFINE4, MXFP4, FORMATS["affine6"])
    one = (AFFINE4, AFFINE4, AFFINE4)
    counts = [MoeDecode("bfloat16", t, *one, 512, 512, 5, 3) for t in (1, 2, 5, 16)]
    return [
        *counts,
        *(MoeDecode("bfloat16", t, *mixed, 512, 64, 5, 3) for t in (1, 16)),
        MoeDecode("float16", 3, DENSE, DENSE, DENSE, 129, 7, 2, 1),
        *(MoeDecode("bfloat16", 1, f, f, f, 6144, 2048, 3, 2) for f in (AFFINE4, MXFP4)),
    ]


def _unknown_to_mlx(dtypes_each: int) -> list[Case]:
    """Formats that MLX does not know, with one or more activation dtypes."""
    made: list[Case] = []
    for fmt in OURS:
        for dtype, tokens in list(zip(DTYPES, (1, 2, 16), strict=True))[:dtypes_each]:
            made.append(MoeDecode(dtype, tokens, fmt, fmt, fmt, 512, 512))
    return made


def _unknown_of_odd_sizes() -> list[Case]:
    """The same formats with odd row counts."""
    up = [MoeDecode("bfloat16", 5, fmt, fmt, DENSE, _columns(fmt), 45) for fmt in OURS]
    return [*up, *(MoeDecode("float16", 2, DENSE, DENSE, fmt, 77, _columns(fmt)) for fmt in OURS)]


def _columns(fmt: Format) -> int:
    """Columns that whole blocks of a format fill, and whole lanes of all 32 do not."""
    return 384 if 384 % fmt.group_size == 0 else 768


_ROUTERS: list[Case] = [
    RouterTopk("bfloat16", 2, "bfloat16", 256, 6144, 8),
    RouterTopk("float16", 3, "float32", 36, 131, 5, 4, 2),
]


def _matvecs(dtypes: list[str]) -> list[Case]:
    made: list[Case] = []
    for i, fmt in enumerate(EACH):
        for n, k in ((40, 1024), (13, 384)):
            made.append(QuantizedMatvec(dtypes[i % len(dtypes)], 1 + 2 * (i % 2), fmt, n, k))
    return made


def expert_cases(quick: bool) -> list[Case]:
    """Every format, the quick cases first."""
    made = [*_by_format(1), *_unknown_to_mlx(1), *_ROUTERS, *_matvecs(["bfloat16"])]
    if not quick:
        made += [*_unknown_to_mlx(3), *_unknown_of_odd_sizes()]
        made += [*_by_format(3), *_odd_sizes(), *_shapes(), *_matvecs(["float16", "float32"])]
        made.append(RouterTopk("float32", 1, "float32", 37, 130, 8))
    return list(dict.fromkeys(made))
