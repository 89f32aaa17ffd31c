"""What a config says about the formats of its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..formats.weights import QUANTIZED, Format, modes, quantized_format
from ..validation import show


def parse_format(where: str, entry: Mapping[str, Any]) -> Format:
    """The format of a config entry, MLX's defaults filled in; ValueError names ``where``.

    A group_size of null is MLX's default: ``mlx_lm.convert --quant-predicate`` writes it.
    """
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in modes():
        expected = ", ".join(modes())
        raise ValueError(f"[config] {where}: mode {show(mode)}, expected one of {expected}.")
    of_mode = [fmt for fmt in QUANTIZED if fmt.mode == mode]
    default = next(fmt for fmt in of_mode if fmt.is_default)
    group_size, bits = entry.get("group_size"), entry.get("bits", default.bits)
    group_size = default.group_size if group_size is None else group_size
    for key, value in (("group_size", group_size), ("bits", bits)):
        options = dict.fromkeys(getattr(fmt, key) for fmt in of_mode)
        if type(value) is not int or value not in options:
            expected = " or ".join(str(option) for option in options)
            raise ValueError(
                f"[config] {where}: {key} {show(value)}, expected {expected} for {mode}."
            )
    return quantized_format(group_size, bits, mode)


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
