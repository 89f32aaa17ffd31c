"""Compares a checkpoint's headers with what its config needs, before any data is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ..formats.weights import DENSE_FORMATS, FP8_BLOCK, Format
from ..models.config import ModelArgs
from ..models.tensor_names import MTP_REASON, layer_of, release_name, unused
from ..models.tensors import Form, Module, modules
from .compressed_tensors import PackQuantized
from .layer_contents import check_expert_counts
from .quantization import Declaration
from .safetensors_header import DTYPES, ITEM_BYTES, TensorInfo, quoted

FP8 = "fp8"  # in blocks; a checkpoint's alone, which becomes bfloat16
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DENSE = {NAMES[dtype]: fmt for dtype, fmt in DENSE_FORMATS.items()}
FLOATS = tuple(DENSE)
SHOWN = 3  # tensors named per kind of problem
MAX_MISSING = 1000
INTEGER_PARTS = ("weight_packed", "weight_scale", "weight_shape")  # of compressed-tensors


class Source(NamedTuple):
    """A weight as stored, in either layout: its module, its tensor and its logical shape."""

    path: str
    tensor: str
    module: Module
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    @property
    def kind(self) -> str:
        return self.form.kind or self.module.kind


class Stored(NamedTuple):
    """A weight found: its format (`FP8` is no kernel's), and its bytes on disk and loaded.

    ``packed`` tells that compressed-tensors wrote it, in that format but for the biases.
    """

    source: Source
    format: Format | str
    nbytes: int
    loaded: int
    packed: bool = False


@dataclass
class Inventory:
    """Every weight of the model and where it is; ``ignored`` counts unused tensors by reason."""

    stored: list[Stored] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)

    @property
    def packed(self) -> dict[str, tuple[Format, tuple[int, ...]]]:
        """Format and shape of what compressed-tensors wrote, by path in the checkpoint."""
        return {
            stored.source.path: (stored.format, stored.source.shape)
            for stored in self.stored
            if stored.packed and isinstance(stored.format, Format)
        }

    @property
    def formats(self) -> dict[str, Format]:
        """The format of every packed weight, by its module in the checkpoint's and our layout."""
        found: dict[str, Format] = {}
        for source, fmt, *_ in self.stored:
            if isinstance(fmt, Format) and fmt.mode != "dense":
                found[source.path] = found[source.module.path] = fmt
                if source.kind == "kv_b_proj":
                    head = source.path.removesuffix("kv_b_proj")
                    found[f"{head}unembed_out"] = fmt
        return found


@dataclass
class _Checker:
    args: ModelArgs
    quantization: Declaration | None
    tensors: Mapping[str, TensorInfo]
    left: dict[str, None]
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
                f"{name} ({info.file}) is {info.dtype} {list(info.shape)}, expected"
                f" {' or '.join(dtypes)} {list(shape)}{why}"
            )
        return info.nbytes

    def check(self, source: Source) -> Stored | None:
        """One weight with its scales; problems are collected."""
        nbytes = 0
        if source.module.bias is not None:
            name, size = source.module.bias
            nbytes += self.expect(f"{source.path}.{name}", FLOATS, (size,))
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
        loaded = nbytes + 2 * prod(source.shape)  # becomes bfloat16
        nbytes += self.expect(source.tensor, ("F8_E4M3",), source.shape)
        blocks = tuple(-(-size // FP8_BLOCK) for size in source.shape)
        nbytes += self.expect(f"{source.tensor}_scale_inv", FLOATS, blocks)
        return Stored(source, FP8, nbytes, loaded)

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
        nbytes, blocks, shared = 0, source.shape[-1] // fmt.group_size, FLOATS
        for plane in fmt.planes:
            name, floats = f"{source.path}.{plane.name}", len(plane.dtypes) > 1
            types = shared if floats else tuple(NAMES[dtype] for dtype in plane.dtypes)
            shape = (*source.shape[:-1], blocks * plane.count)
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
        if source.kind == "kv_b_proj":  # embed_q becomes dense
            dense, info = prod(source.module.shape), self.tensors.get(f"{path}.weight_scale")
            loaded -= (words + 2 * scales) * dense // prod(source.shape)
            loaded += dense * ITEM_BYTES[info.dtype] if info else 0
        return Stored(source, declared, nbytes + words + scales + shape, loaded, packed=True)

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
        for part in ("scales", "biases", "weight_scale_inv", *INTEGER_PARTS):
            self.left.pop(f"{path}.{part}", None)


def check_tensors(
    args: ModelArgs, quantization: Declaration | None, tensors: Mapping[str, TensorInfo]
) -> Inventory:
    """Match headers with a config.

    Raises ValueError, naming the first few tensors of each kind and their number, if tensors are
    missing, unexpected, of another shape or type, or not packed as the config declares.
    """
    check_expert_counts(args, tensors)
    inventory = Inventory()
    used = _set_aside(args, tensors, inventory)
    checker = _Checker(args, quantization, tensors, used)
    for source in _sources(args, tensors):
        stored = checker.check(source)
        if stored is not None:
            inventory.stored.append(stored)
        if len(checker.missing) >= MAX_MISSING:  # the config may name any number of experts
            raise ValueError(f"[checkpoint] {_names('missing', checker.missing, 'at least ')}.")
    _check_experts_alike(inventory, checker.wrong)
    parts = [
        _names(kind, names)
        for kind, names in (("missing", checker.missing), ("unexpected", list(checker.left)))
        if names
    ]
    if checker.wrong:
        parts.append("; ".join(checker.wrong[:SHOWN]) + _more(checker.wrong))
    if parts:
        raise ValueError(f"[checkpoint] {'. '.join(parts)}.")
    return inventory


def _set_aside(
    args: ModelArgs, tensors: Mapping[str, TensorInfo], inventory: Inventory
) -> dict[str, None]:
    """Count the tensors that the model has no use for; returns the names of the others."""
    mtp_layers = {
        layer_of(release_name(name, args)) for name in tensors if ".eh_proj.weight" in name
    }
    used: dict[str, None] = {}
    for name in tensors:
        reason = unused(name, args)
        # A layer too many that is no MTP layer means another config.
        too_many = reason == MTP_REASON and layer_of(name) not in (None, *mtp_layers)
        if reason is None or too_many:
            used[name] = None
        else:
            inventory.ignored[reason] = inventory.ignored.get(reason, 0) + 1
    return used


def _sources(args: ModelArgs, names: Mapping[str, TensorInfo]) -> Iterator[Source]:
    """The weights to find. What is in no form is looked for in the one of the rest."""
    release = any(".mlp.experts." in name or ".kv_b_proj." in name for name in names)
    for module in modules(args):
        form = module.form_in(names, default=1 if release else 0)
        if form.first_row == 0:  # else the tensor is another module's as well, and that one's here
            for path in form.paths(module.experts):
                yield Source(path, path + form.suffix, module, form)


def _check_experts_alike(inventory: Inventory, wrong: list[str]) -> None:
    """Experts are stacked, so one format has to serve all of a projection."""
    first: dict[str, Stored] = {}
    for stored in inventory.stored:
        if not stored.source.module.experts:
            continue
        other = first.setdefault(stored.source.module.path, stored)
        if stored.format != other.format:
            wrong.append(
                f"{stored.source.tensor} is {stored.format}, expected {other.format} like"
                f" {other.source.tensor}"
            )


def _names(kind: str, names: list[str], at_least: str = "") -> str:
    noun = "tensor" if len(names) == 1 else "tensors"
    shown = ", ".join(_shown(name) for name in names[:SHOWN])
    return f"{at_least}{len(names)} {kind} {noun}: {shown}{_more(names)}"


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 200 else quoted(name)


def _more(items: list[str]) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
