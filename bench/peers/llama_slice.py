"""Writes the slice of GLM-5.2 (glm52_slice.py) as GGUF files, for llama.cpp in bench_prompt.py.

    python bench/peers/llama_slice.py FOLDER --layers 3 --experts 16 --vocabulary 4096

The files are slice-BF16.gguf, slice-F16.gguf and slice-Q4_0.gguf, whose weights have the same
values; the indexer's are bfloat16 in the last. They have no vocabulary. llama_gguf.py says how to
build llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
import glm52_slice
from glm52_slice import Slice

from glm_fused.checkpoint.gguf_metadata import metadata_of
from glm_fused.checkpoint.gguf_names import gguf_name
from glm_fused.checkpoint.gguf_types import TYPES_BY_NAME
from glm_fused.checkpoint.gguf_writer import NewTensor, write_shards
from glm_fused.host import to_numpy
from glm_fused.models.config import args_from_config
from glm_fused.models.tensors import modules

TYPES = ("BF16", "F16", "Q4_0")
BLOCK = 32  # columns of Q4_0's, which have a float16 scale


def values(tensor: NewTensor, path: str) -> NDArray[Any]:
    """The values of a tensor of the module ``path``, in the bits of its type."""
    if len(tensor.shape) == 1:
        return np.full(tensor.shape, 0 if tensor.name.endswith(".bias") else 1, np.float32)
    if tensor.type.name == "F32":
        return to_numpy(glm52_slice.router(path, tensor.shape).astype(mx.float32))
    packed = glm52_slice.packed_codes(path, tensor.shape)
    scale = glm52_slice.scale(tensor.shape)
    kind = tensor.type.name
    return q4_0(packed, scale) if kind == "Q4_0" else floats(packed, scale, kind)


def q4_0(packed: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Blocks of Q4_0 [..., k / 32 * 18] of nibbles [..., k / 2]."""
    pairs = packed.reshape(*packed.shape[:-1], -1, BLOCK // 2)
    codes = glm52_slice.codes_of(pairs)
    blocks = np.empty((*pairs.shape[:-1], 18), np.uint8)
    blocks[..., :2] = np.full(1, scale, np.float16).view(np.uint8)
    blocks[..., 2:] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return blocks.reshape(*packed.shape[:-1], -1)


def floats(packed: NDArray[np.uint8], scale: float, kind: str) -> NDArray[np.uint16]:
    """The bits of the values [..., k] of nibbles [..., k / 2], as BF16 or F16."""
    values = (np.arange(16, dtype=np.float32) - glm52_slice.ZERO) * np.float32(scale)
    bits = values.view(np.uint32) >> 16 if kind == "BF16" else values.astype("f2").view("u2")
    return np.take(bits.astype(np.uint16), glm52_slice.codes_of(packed))


def tensors(of: Slice, kind: str) -> Iterator[tuple[str, NewTensor]]:
    """The tensors of a file whose matrices have the type ``kind``, by the module of each."""
    for module in modules(args_from_config(of.config())):
        own = "BF16" if module.sensitive and kind == "Q4_0" else kind
        own = own if module.quantizable else "F32"
        name = gguf_name(f"{module.path}.weight")
        yield module.path, NewTensor(name, TYPES_BY_NAME[own], module.shape)
        if module.bias is not None:
            leaf, size = module.bias
            name = gguf_name(f"{module.path}.{leaf}")
            yield module.path, NewTensor(name, TYPES_BY_NAME["F32"], (size,))


def write(of: Slice, kind: str, file: Path) -> None:
    """Write the slice with matrices of the type ``kind``, one tensor after the other."""
    keys = metadata_of(args_from_config(of.config()), file.stem, [])
    paths = {tensor: path for path, tensor in tensors(of, kind)}

    def contents(tensor: NewTensor) -> Iterator[bytes]:
        yield values(tensor, paths[tensor]).tobytes()

    write_shards(file, keys | {"tokenizer.ggml.model": "none"}, [list(paths)], contents)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    glm52_slice.add_options(parser)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write to")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for kind in options.types:
        file = options.folder / f"slice-{kind}.gguf"
        write(glm52_slice.chosen(options), kind, file)
        print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
