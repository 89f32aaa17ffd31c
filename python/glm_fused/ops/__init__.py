"""The operations the model is made of.

Each has two paths that agree bit for bit: the fused kernels, and the unfused reference that
`glm_fused.reference_path()` or ``GLM_FUSED_REFERENCE=1`` selects; `glm_fused.ops.routes` tells
which code that is on a CPU and on a GPU. Each takes ``stream=``, an MLX stream or device, as MLX's
own ops do.
"""

from ..formats.weights import Weight
from . import blocks
from .attention import append_packed, append_pair, append_rows, indexer_topk, sparse_mla_decode
from .experts import expert_matvec, moe_decode, router_topk
from .matvec import quantized_matvec
from .norms import layer_norm, rms_norm, rotate
from .steps import expert_sum, swiglu

__all__ = [
    "Weight",
    "append_packed",
    "append_pair",
    "append_rows",
    "blocks",
    "expert_matvec",
    "expert_sum",
    "indexer_topk",
    "layer_norm",
    "moe_decode",
    "quantized_matvec",
    "rms_norm",
    "rotate",
    "router_topk",
    "sparse_mla_decode",
    "swiglu",
]
