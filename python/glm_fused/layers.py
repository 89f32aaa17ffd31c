"""Linear layers over ``glm_fused.ops``, with mlx-lm's parameter names and quantization protocol."""

from abc import ABC, abstractmethod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import ops


class _Layer(nn.Module, ABC):
    """y = x W^T (+ bias), accumulated in float32 and returned in x's dtype."""

    @abstractmethod
    def as_weight(self) -> ops.Weight:
        """The layer's parameters in the form that the kernels take."""

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.quantized_matvec(x, self.as_weight())
        return y + self.bias.astype(y.dtype) if "bias" in self else y


class QuantizedLinear(_Layer):
    """Any of the layers below with a packed ``weight``, ``scales`` and (affine) ``biases``."""

    def __init__(self, dense: "_Dense", group_size: int | None, bits: int | None, mode: str):
        super().__init__()
        self.weight, self.scales, *biases = mx.quantize(dense.weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        if "bias" in dense:
            self.bias = dense.bias
        in_dims = dense.weight.shape[-1]
        self.group_size = in_dims // self.scales.shape[-1]
        self.bits = self.weight.shape[-1] * 32 // in_dims
        self.mode = mode
        self.freeze()

    def as_weight(self) -> ops.Weight:
        return _packed_weight(self)


class _Dense(_Layer):
    """A float ``weight`` [..., out, in]."""

    def __init__(self, *shape: int):
        super().__init__()
        bound = shape[-1] ** -0.5
        self.weight = mx.random.uniform(low=-bound, high=bound, shape=shape)

    def as_weight(self) -> ops.Weight:
        return ops.Weight(self.weight)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedLinear:
        return QuantizedLinear(self, group_size, bits, mode)


class Linear(_Dense):
    """x [..., m, in] -> [..., m, out]."""

    def __init__(self, in_dims: int, out_dims: int, bias: bool = False):
        super().__init__(out_dims, in_dims)
        if bias:
            self.bias = mx.zeros((out_dims,))


class MultiLinear(_Dense):
    """One matrix per head: x [..., heads, m, in] -> [..., heads, m, out]."""

    def __init__(self, in_dims: int, out_dims: int, heads: int):
        super().__init__(heads, out_dims, in_dims)


class SwitchLinear(_Dense):
    """The stacked weights of one expert projection; ``ops.moe_decode`` applies them."""

    def __init__(self, in_dims: int, out_dims: int, experts: int):
        super().__init__(experts, out_dims, in_dims)


def _packed_weight(layer: Any) -> ops.Weight:
    biases = layer.get("biases")
    return ops.Weight(layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode)


def embedding_weight(embedding: nn.Module) -> ops.Weight:
    """An ``nn.Embedding`` or ``nn.QuantizedEmbedding`` as the weight of a tied output head."""
    if "scales" in embedding:
        return _packed_weight(embedding)
    return ops.Weight(embedding.weight)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), x [..., m, hidden]."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def weights(self) -> tuple[ops.Weight, ops.Weight, ops.Weight]:
        """Of gate, up and down."""
        return self.gate_proj.as_weight(), self.up_proj.as_weight(), self.down_proj.as_weight()

    def __call__(self, x: mx.array) -> mx.array:
        # Not nn.silu: it is mx.compile'd, which on the CPU wants a C++ compiler at run time.
        gate = self.gate_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))
