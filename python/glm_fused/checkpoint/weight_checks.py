"""Checks of one weight's tensors, in each way in which checkpoints store it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from ..formats.weights import DENSE_FORMATS, FP8, FP8_BLOCK, Format, plane_shape
from . import compressed_tensors, modelopt
from .compressed_tensors import PackQuantized
from .gguf_config import METHOD as GGUF
from .gguf_formats import TypedTensors, expected_types, format_of
from .modelopt import ModelOpt
from .quantization import Declaration
from .safetensors_header import ITEM_BYTES, NAMES, TensorInfo
from .stored import FP8_AS_BF16, Source, Stored

DENSE = {NAMES[dtype]: fmt for dtype, fmt in DENSE_FORMATS.items()}
FLOATS = tuple(DENSE)
INTEGER_PARTS = ("weight_packed", "weight_scale", "weight_shape")  # of compressed-tensors
MODELOPT_SCALES = ("weight_scale", "weight_scale_2")
_SCALES = (
    "scales", "biases", "weight_scale_inv", *INTEGER_PARTS, *MODELOPT_SCALES, "input_scale",
)  # fmt: skip


@dataclass
class Checker:
    """Checks one weight after another; ``missing``, ``wrong`` and what is ``left`` are problems.

    ``shown`` gives the name that the checkpoint has for a tensor, for messages.
    """

    quantization: Declaration | None
    tensors: Mapping[str, TensorInfo]
    left: dict[str, None]
    shown: Callable[[str], str] = str
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def take(self, name: str) -> TensorInfo | None:
        self.left.pop(name, None)
        info = self.tensors.get(name)
        if info is None:
            self.missing.append(name)
        return info

    def expect(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str = ""
    ) -> int:
        """Check one tensor; returns its bytes, 0 if it is missing."""
        info = self.take(name)
        if info is None:
            return 0
        if info.dtype not in dtypes or info.shape != shape:
            self.wrong.append(
                f"{self.shown(name)} ({info.file}) is {info.dtype} {list(info.shape)}, expected"
                f" {_or(dtypes)} {list(shape)}{why}"
            )
        return info.nbytes

    def check(self, source: Source) -> Stored | None:
        """One weight with its scales; problems are collected."""
        nbytes = 0
        if source.module.bias is not None:
            name, size = source.module.bias
            nbytes += self.expect(f"{source.path}.{name}", FLOATS, (size,))
        if isinstance(self.quantization, TypedTensors):
            return self._typed(source, nbytes)
        if self._is_of_modelopt(source):
            return self._nvfp4(source, nbytes)
        info = self.tensors.get(source.tensor)
        if info is None and any(f"{source.path}.{part}" in self.tensors for part in INTEGER_PARTS):
            return self._integers(source, nbytes)
        if info is None:
            self.take(source.tensor)
            self._leave_out(source.path)
            return None
        if f"{source.path}.scales" in self.tensors or info.dtype == "U32":
            return self._quantized(source, nbytes)
        self._check_dense(source)
        if info.dtype != "F8_E4M3" or len(source.shape) != 2 or not source.module.quantizable:
            nbytes += self.expect(source.tensor, FLOATS, source.shape)
            return Stored(source, DENSE.get(info.dtype, info.dtype), nbytes, nbytes)
        return self._fp8(source, nbytes)

    def _typed(self, source: Source, nbytes: int) -> Stored | None:
        """A weight of GGUF: its tensor's type is its format."""
        info = self.take(source.tensor)
        if info is None:
            return None
        fmt, quantizable = format_of(info.dtype), source.module.quantizable
        packed = fmt is not None and fmt.mode != "dense"
        if fmt is None or (packed and not quantizable) or info.shape != source.shape:
            self.wrong.append(
                f"{self.shown(source.tensor)} ({info.file}) is {info.dtype} {list(info.shape)},"
                f" expected {list(source.shape)} of {expected_types(quantizable)}"
            )
            return None
        nbytes += info.nbytes
        if packed and source.kind == "kv_b_proj":
            return Stored(source, fmt, nbytes, _split_bytes(source, nbytes, 2), GGUF)
        return Stored(source, fmt, nbytes, nbytes)

    def _fp8(self, source: Source, nbytes: int) -> Stored:
        """Codes with a scale for each square; experts stay so, the rest becomes bfloat16."""
        as_bf16 = nbytes + 2 * prod(source.shape)
        nbytes += self.expect(source.tensor, ("F8_E4M3",), source.shape)
        squares = tuple(-(-size // FP8_BLOCK) for size in source.shape)
        nbytes += self.expect(f"{source.tensor}_scale_inv", FLOATS, squares)
        if source.module.experts and source.shape[-1] % FP8_BLOCK == 0:
            return Stored(source, FP8, nbytes, nbytes)
        return Stored(source, FP8_AS_BF16, nbytes, as_bf16)

    def _check_dense(self, source: Source) -> None:
        if self.quantization is None:
            return
        declared, explicit = self.quantization.declared(source.path)
        if explicit and declared and source.shape[-1] % declared.group_size == 0:
            self.wrong.append(
                f"{source.tensor} has no scales, but config.json declares it {declared}"
            )

    def _quantized(self, source: Source, nbytes: int) -> Stored | None:
        stacked = source.module.quantizable and source.form.suffix != ""
        packs = stacked and not isinstance(self.quantization, PackQuantized)
        declared = self._declared(source, source.tensor, packs)
        if declared is not None:
            nbytes += self._planes(source, declared)
            return Stored(source, declared, nbytes, nbytes)
        self.left.pop(source.tensor, None)
        self._leave_out(source.path)
        return None

    def _planes(self, source: Source, fmt: Format) -> int:
        """Check the planes of a packed weight; returns their bytes."""
        nbytes, shared = 0, FLOATS
        for plane in fmt.planes:
            name, floats = f"{source.path}.{plane.name}", len(plane.dtypes) > 1
            types = shared if floats else tuple(NAMES[dtype] for dtype in plane.dtypes)
            shape = plane_shape(fmt, plane, source.shape)
            nbytes += self.expect(name, types, shape, f" ({fmt} in config.json)")
            if floats and name in self.tensors:
                shared = (self.tensors[name].dtype,)  # of all planes of floats
        return nbytes

    def _integers(self, source: Source, nbytes: int) -> Stored | None:
        """A weight of compressed-tensors: packed integers with scales, and its shape as data."""
        path, name = source.path, f"{source.path}.{INTEGER_PARTS[0]}"
        packs = source.module.quantizable and isinstance(self.quantization, PackQuantized)
        declared = self._declared(source, name, packs)
        self._leave_out(path)
        if declared is None:
            return None
        rows, columns, why = source.shape[0], source.shape[-1], f" ({declared} in config.json)"
        packed, groups = columns * declared.bits // 32, columns // declared.group_size
        words = self.expect(name, ("I32",), (rows, packed), why)
        scales = self.expect(f"{path}.weight_scale", FLOATS, (rows, groups), why)
        shape = self.expect(f"{path}.weight_shape", ("I32", "I64"), (2,))
        loaded = nbytes + words + 2 * scales  # biases are as many
        info = self.tensors.get(f"{path}.weight_scale")
        if source.kind == "kv_b_proj" and info is not None:
            loaded = _split_bytes(source, words + 2 * scales, ITEM_BYTES[info.dtype])
        method = compressed_tensors.METHOD
        return Stored(source, declared, nbytes + words + scales + shape, loaded, method)

    def _is_of_modelopt(self, source: Source) -> bool:
        """Whether tensors are those that modelopt packs a weight to, as far as there are any."""
        names = [f"{source.path}.{part}" for part in MODELOPT_SCALES]
        if not isinstance(self.quantization, ModelOpt):
            return names[1] in self.tensors  # other methods have scales of the first name
        info = self.tensors.get(source.tensor)
        return any(name in self.tensors for name in names) or bool(info and info.dtype == "U8")

    def _nvfp4(self, source: Source, nbytes: int) -> Stored | None:
        """A weight of modelopt: two codes a byte, scales of 16 values each, and a factor."""
        path, fmt = source.path, self._declared_nvfp4(source)
        self._leave_out(path)
        if fmt is None:
            self.left.pop(source.tensor, None)
            return None
        rows, columns = source.shape
        planes = self.expect(source.tensor, ("U8",), (rows, columns * fmt.bits // 8))
        planes += self.expect(
            f"{path}.weight_scale", ("F8_E4M3",), (rows, columns // fmt.group_size)
        )
        factor = self._scalar(f"{path}.weight_scale_2")
        unused = f"{path}.input_scale"  # of activations, which are not quantized here
        disk = self._scalar(unused) if unused in self.tensors else 0
        disk += nbytes + planes + factor
        loaded = nbytes + planes + factor
        if source.kind == "kv_b_proj":
            loaded = _split_bytes(source, planes, 2) + factor * source.module.shape[0]
        return Stored(source, fmt, disk, loaded, modelopt.METHOD)

    def _declared_nvfp4(self, source: Source) -> Format | None:
        if not source.module.quantizable or len(source.shape) != 2:
            self.wrong.append(f"{source.tensor} is packed by modelopt, expected {_or(FLOATS)}")
            return None
        return self._declared(source, source.tensor, isinstance(self.quantization, ModelOpt))

    def _scalar(self, name: str) -> int:
        """Check a tensor of one float; returns its bytes, 0 if it is missing."""
        info = self.tensors.get(name)
        return self.expect(name, ("F32",), (1,) if info and info.shape == (1,) else ())

    def _declared(self, source: Source, tensor: str, packs: bool) -> Format | None:
        """The format that the config declares for a quantized tensor; problems are collected."""
        columns, quantization = source.shape[-1], self.quantization
        declared = quantization.declared(source.path)[0] if quantization and packs else None
        if declared is None:
            self.wrong.append(f"{tensor} is quantized, but config.json does not declare it")
        elif columns % declared.group_size:
            self.wrong.append(
                f"{tensor} has rows of {columns}, which groups of {declared.group_size}"
                f" ({declared}) do not divide"
            )
            return None
        return declared

    def _leave_out(self, path: str) -> None:
        """One problem is enough: do not also call the scales of a weight unexpected."""
        for part in _SCALES:
            self.left.pop(f"{path}.{part}", None)


def _split_bytes(source: Source, packed: int, item_bytes: int) -> int:
    """Bytes of ``kv_b_proj``, ``packed`` as stored, once ``embed_q`` has become dense."""
    dense = prod(source.module.shape)
    return packed - packed * dense // prod(source.shape) + dense * item_bytes


def _or(options: tuple[str, ...]) -> str:
    return " or ".join(options)
