"""Which formats the tensors of a GGUF model are in."""

from __future__ import annotations

from functools import cache

from ..formats.weights import FORMATS, Format
from .gguf_types import GGML_TYPES, TYPES_BY_NAME, GgmlType
from .safetensors_header import DTYPES, NAMES


class TypedTensors:
    """What GGUF declares of its modules: nothing, since each tensor's type says its format."""

    def declared(self, path: str) -> tuple[Format | None, bool]:
        """None, and False: no entry names the module."""
        return None, False


@cache
def format_of(type_name: str) -> Format | None:
    """The format of a type that ggml names, None where the kernels have none."""
    kind = TYPES_BY_NAME[type_name]
    for fmt in FORMATS.values():
        plane = fmt.planes[0]
        if fmt.mode == "dense" and NAMES[plane.dtypes[0]] == type_name:
            return fmt
        blocks = fmt.name.removeprefix("ggml-") == type_name.lower() and len(fmt.planes) == 1
        if blocks and (fmt.group_size, plane.count) == (kind.columns, kind.nbytes):
            return fmt
    return None


def type_of(fmt: Format) -> GgmlType:
    """The type of a format that GGUF has, the inverse of `format_of`."""
    return next(kind for kind in GGML_TYPES.values() if format_of(kind.name) == fmt)


def expected_types(quantizable: bool) -> str:
    """The types that a weight may have, for an error message."""
    names = [kind.name for kind in GGML_TYPES.values() if format_of(kind.name) is not None]
    return ", ".join(name for name in names if quantizable or name in DTYPES)
