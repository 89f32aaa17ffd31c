"""Layers over ``glm_fused.ops``, with mlx-lm's parameter names and quantization protocol.

They are subclasses of the stock layers, which is how mlx-lm's tools know what they can dequantize,
adapt and train; only what a layer computes is ours.
"""

from abc import ABC, abstractmethod

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import switch_layers

from .. import ops
from ..formats.weights import (
    QUANTIZED,
    Format,
    dequantize,
    plane_names,
    plane_shape,
    quantized_format,
)
from ..ops import stock


class _Layer(nn.Module, ABC):
    @abstractmethod
    def as_weight(self) -> ops.Weight:
        """The layer's parameters in the form that the kernels take."""


class _Applied(_Layer):
    """Computes y = x W^T (+ bias), accumulated in float32 and returned in x's dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.quantized_matvec(x, self.as_weight())
        return y + self.bias.astype(y.dtype) if "bias" in self else y


class _Packed(nn.Module):
    """The planes of a weight in one format, by their names; they are frozen."""

    format: Format

    def __init__(self, weight: ops.Weight, dense: nn.Module):
        nn.Module.__init__(self)  # a stock layer's own __init__ would make a weight
        self.format = fmt = weight.format
        # mlx-lm's tools ask a quantized layer for these. They give the mode to MLX, which has to
        # refuse a format that it does not know.
        self.group_size, self.bits = fmt.group_size, fmt.bits
        self.mode = fmt.mode if fmt in QUANTIZED else fmt.name
        self.biases = None  # stock code reads it in every mode
        for name, plane in zip(plane_names(fmt), weight.planes, strict=True):
            setattr(self, name, plane)
        if "bias" in dense:
            self.bias = dense.bias
        self.freeze()

    def as_weight(self) -> ops.Weight:
        """The layer's parameters in the form that the kernels take."""
        return ops.Weight([self[name] for name in plane_names(self.format)], self.format)


class _Packable(nn.Module):
    """A layer with a float ``weight`` [..., out, in] that may be packed."""

    packed_class: type[_Packed]

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> _Packed:
        """The layer with its weight quantized, as ``nn.quantize`` asks for it."""
        fmt = quantized_format(group_size, bits, mode)
        return self.packed_class(ops.Weight(mx.quantize(self.weight, **fmt.parameters), fmt), self)

    def unfilled(self, fmt: Format) -> _Packed:
        """The layer in a format, with zeros in the place of the planes that are loaded later."""
        shape = self.weight.shape
        planes = [mx.zeros(plane_shape(fmt, p, shape), p.dtypes[0]) for p in fmt.planes]
        return self.packed_class(ops.Weight(planes, fmt), self)


class _Quantized(_Packed, _Layer):
    """A packed layer of linear maps."""


class _Dense(_Packable, _Layer):
    """A layer of linear maps in floats."""

    def __init__(self, *shape: int):
        nn.Module.__init__(self)
        bound = shape[-1] ** -0.5
        self.weight = mx.random.uniform(low=-bound, high=bound, shape=shape)

    def as_weight(self) -> ops.Weight:
        return ops.Weight.dense(self.weight)


class QuantizedLinear(_Applied, _Quantized, nn.QuantizedLinear):  # type: ignore[misc]
    """A packed `Linear`."""


class Linear(_Applied, _Dense, nn.Linear):  # type: ignore[misc]
    """Maps x [..., m, in] to [..., m, out]."""

    packed_class = QuantizedLinear

    def __init__(self, in_dims: int, out_dims: int, bias: bool = False):
        super().__init__(out_dims, in_dims)
        if bias:
            self.bias = mx.zeros((out_dims,))


class _PerHead(_Applied):
    def to_lora(self, r: int, scale: float, dropout: float) -> "_PerHead":
        """The layer itself: mlx-lm does not adapt these matrices either."""
        return self


class QuantizedMultiLinear(_PerHead, _Quantized, switch_layers.QuantizedSwitchLinear):  # type: ignore[misc]
    """A packed `MultiLinear`."""


class MultiLinear(_PerHead, _Dense, switch_layers.SwitchLinear):  # type: ignore[misc]
    """Maps x [..., heads, m, in] to [..., heads, m, out], with one matrix per head."""

    packed_class = QuantizedMultiLinear

    def __init__(self, in_dims: int, out_dims: int, heads: int):
        super().__init__(heads, out_dims, in_dims)


class _PerExpert(_Layer):
    """One projection of all experts.

    `SwitchMLP` gives all three to ``ops.moe_decode``, and calls them where one has an adapter.
    """

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x [..., m, in] by the matrices of integer experts [...] to [..., m, out]."""
        # On the CPU MLX accumulates in the dtype of its input, hence float32.
        rows = x.astype(mx.float32) if mx.default_device() == mx.cpu else x
        return stock.gather(rows, self.as_weight(), experts, sorted_indices).astype(x.dtype)

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """The layer with a low-rank adapter, as mlx-lm's trainer asks for it."""
        from .lora import AdaptedExperts  # mlx-lm's trainer, which inference does not need

        return AdaptedExperts.from_base(self, r, dropout, scale)


class QuantizedSwitchLinear(_PerExpert, _Quantized, switch_layers.QuantizedSwitchLinear):  # type: ignore[misc]
    """A packed `SwitchLinear`."""


class SwitchLinear(_PerExpert, _Dense, switch_layers.SwitchLinear):  # type: ignore[misc]
    """The stacked weights of one expert projection."""

    packed_class = QuantizedSwitchLinear

    def __init__(self, in_dims: int, out_dims: int, experts: int):
        super().__init__(experts, out_dims, in_dims)


class QuantizedEmbedding(_Packed, nn.QuantizedEmbedding):  # type: ignore[misc]
    """A packed `Embedding`."""

    def __init__(self, weight: ops.Weight, dense: nn.Module):
        super().__init__(weight, dense)
        self.num_embeddings, self.dims = dense.weight.shape

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens [...] -> their rows [..., dims], as stock code makes them where it can."""
        if self.format in QUANTIZED:
            return super().__call__(x)  # type: ignore[no-any-return]
        planes = zip(self.format.planes, self.as_weight().planes, strict=True)
        rows = [plane if spec.per_matrix else plane[x] for spec, plane in planes]
        return dequantize(ops.Weight(rows, self.format), mx.bfloat16)


class Embedding(_Packable, nn.Embedding):  # type: ignore[misc]
    """Maps tokens to rows of its weight, which may be that of a tied output head too."""

    packed_class = QuantizedEmbedding

    def as_weight(self) -> ops.Weight:
        return ops.Weight.dense(self.weight)


class RMSNorm(nn.RMSNorm):
    """Scales x [..., dims] by the inverse of its root mean square, and by a weight.

    As with MLX's own, the result has the wider of the two dtypes.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(_as_wide(x, self.weight), self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Brings x [..., dims] to mean 0 and variance 1, then applies a weight and a bias.

    As with MLX's own, the result has the widest of the dtypes.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(_as_wide(x, self.weight), self.weight, self.bias, self.eps)


def _as_wide(x: mx.array, weight: mx.array) -> mx.array:
    return x if x.dtype == weight.dtype else x.astype(mx.result_type(x, weight))


def keeps_dtype(norm: RMSNorm | LayerNorm, x: mx.array) -> bool:
    """Whether what the norm gives has x's dtype."""
    dtype = norm.weight.dtype
    return bool(dtype == x.dtype or x.dtype == mx.float32)


_PLAIN = frozenset((Linear, QuantizedLinear, MultiLinear, QuantizedMultiLinear))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of linear maps without a bias, and not an adapter around one."""
    return type(layer) in _PLAIN and "bias" not in layer


class Joined:
    """Marks layers of linear maps of which this process has a part: it gathers the others'."""


def is_recordable(layer: nn.Module) -> bool:
    """Whether a decode step can be recorded of a layer: a plain one, or a rank's part of one."""
    return is_plain(layer) or (isinstance(layer, Joined) and "bias" not in layer)


class MLP(nn.Module):
    """Computes down(silu(gate(x)) * up(x)), a SwiGLU, of x [..., m, hidden]."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def weights(self) -> tuple[ops.Weight, ops.Weight, ops.Weight]:
        """The weights of gate, up and down."""
        return self.gate_proj.as_weight(), self.up_proj.as_weight(), self.down_proj.as_weight()

    def is_plain(self) -> bool:
        """Whether its matrices are all there is: no adapters in training."""
        return is_plain(self.gate_proj) and is_plain(self.up_proj) and is_plain(self.down_proj)

    def is_recordable(self) -> bool:
        """Whether a decode step can be recorded of it: no adapters in training."""
        return all(map(is_recordable, (self.gate_proj, self.up_proj, self.down_proj)))

    def feed_forward(self, x: mx.array) -> mx.array:
        """x [..., m, hidden] -> the same shape."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """The half of a layer: x [b, l, hidden] + MLP(norm(x))."""
        if ops.blocks.takes(x) and keeps_dtype(norm, x) and self.is_plain():
            return ops.blocks.mlp_block(x, (norm.weight, norm.eps), self.weights())
        return x + self.feed_forward(norm(x))
