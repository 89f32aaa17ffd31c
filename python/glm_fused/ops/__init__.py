"""The operations the model is made of.

Each has two paths that agree bit for bit: the fused kernels, and the unfused reference that
`glm_fused.reference_path()` or ``GLM_FUSED_REFERENCE=1`` selects; `glm_fused.ops.routes` tells
which code that is on a CPU and on a GPU. Each takes ``stream=``, an MLX stream or device, as MLX's
own ops do.
"""

from .attention import indexer_topk, sparse_mla_decode
from .experts import moe_decode, router_topk
from .matvec import quantized_matvec
from .steps import expert_sum, swiglu
from .weight import Weight

__all__ = [
    "Weight",
    "expert_sum",
    "indexer_topk",
    "moe_decode",
    "quantized_matvec",
    "router_topk",
    "sparse_mla_decode",
    "swiglu",
]
