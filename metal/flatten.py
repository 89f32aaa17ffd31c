"""Makes one self-contained text of a shader: its headers, and MLX's own arithmetic.

    python flatten.py <mlx include folder> <output.cpp> <name>...

writes C++ that defines ``glm_fused::metal_source::<name>`` for each ``<name>.metal`` beside this
script. MLX's functions are taken word for word from its headers; `qdot` is given the address space
of registers instead of device memory, which lets a kernel read a weight once and use it often, and
so is a copy of `load_vector`, for vectors that a kernel computes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
KERNELS = "mlx/backend/metal/kernels"
ARITHMETIC = "mlx_arithmetic.h"
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)

# For each namespace, a header of MLX and the definitions taken from it, in order: as they are, with
# their weights in registers, and once more as `own_*`, with their vector in registers.
_TAKEN = {
    "mlx_affine": (
        "quantized.h",
        ["get_pack_factor", "get_bytes_per_pack", "load_vector"],
        ["qdot", "dequantize"],
        ["load_vector"],
    ),
    "mlx_fp": (
        "fp_quantized.h",
        [
            "get_pack_factor",
            "get_bytes_per_pack",
            "dequantize_scale",
            "struct Dequantize",
            "load_vector",
        ],
        ["qdot"],
        ["load_vector"],
    ),
}


def definition(header: Path, name: str) -> str:
    """The template `name` (a function, or "struct X") of a header, as it stands there."""
    start = rf"\b{name} \{{" if name.startswith("struct") else rf"\b{name}\([^{{;]*\) \{{"
    pattern = rf"^template <[^{{;]*?{start}\n.*?^\}};?\n"
    found = re.findall(pattern, header.read_text(), re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"{header} must define the template {name!r} once, not {len(found)} times")
    return found[0]


def in_registers(text: str) -> str:
    """The same text with its weights in `thread` memory."""
    return re.sub(r"\bconst device (uint8_t|uint16_t)\*", r"const thread \1*", text)


def own(text: str, name: str) -> str:
    """The same function under the name `own_*`, with its vector in `thread` memory."""
    return text.replace(f" {name}(const device T*", f" own_{name}(const thread T*")


def mlx_arithmetic(include: Path) -> str:
    kernels = include / KERNELS
    parts = ["#pragma once\n", *((kernels / h).read_text() for h in ("fp4.h", "fp8.h"))]
    for namespace, (header, plain, moved, owned) in _TAKEN.items():
        path = kernels / header
        body = [definition(path, name) for name in plain]
        body += [in_registers(definition(path, name)) for name in moved]
        body += [own(definition(path, name), name) for name in owned]
        parts.append(f"namespace {namespace} {{\n\n" + "\n".join(body) + f"\n}} // {namespace}\n")
    return "\n".join(parts).replace("#pragma once\n", "")


def flatten(name: str, include: Path, folder: Path = FOLDER) -> str:
    """The text of ``<name>.metal``, with each header of this folder where it is first included."""
    seen: set[str] = set()

    def expand(text: str) -> str:
        return _INCLUDE.sub(lambda m: load(m[1]), text).replace("#pragma once\n", "")

    def load(header: str) -> str:
        if header in seen:
            return ""
        seen.add(header)
        if header == ARITHMETIC:
            return mlx_arithmetic(include)
        return expand((folder / header).read_text())

    notice = (folder / "LICENSE.mlx").read_text().strip().replace("\n", "\n// ")
    used = f"// {ARITHMETIC} is taken from MLX:\n// {notice}\n\n"
    body = expand((folder / f"{name}.metal").read_text())
    text = (used if ARITHMETIC in seen else "") + body
    text = re.sub(r" +$", "", text.replace("©", "(c)"), flags=re.MULTILINE)
    text.encode("ascii")  # raises for other text: MLX hands it to Metal as ASCII
    return text


def cpp(names: list[str], include: Path) -> str:
    lines = ["// Written by metal/flatten.py.", "namespace glm_fused::metal_source {", ""]
    for name in names:
        lines.append(f'extern const char* const {name} = R"metal({flatten(name, include)})metal";')
    return "\n".join([*lines, "", "}  // namespace glm_fused::metal_source", ""])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(cpp(sys.argv[3:], Path(sys.argv[1])))
