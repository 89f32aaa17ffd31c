"""What is measured: layers of a model whose weights are random bits, and caches of any length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..formats.weights import FORMATS
from ..models.cache import append
from ..models.config import ModelArgs
from ..models.decoder import Model
from ..models.moe import Router
from ..selftest.backends import CPU, Backend
from ..selftest.synthetic import Bits

# One layer of each kind that GLM-5.2 has, and of how many it has each.
KINDS = {"dense, full": 3, "sparse, full": 18, "sparse, shared": 57}
_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "indexer_types": ["full", "full", "shared"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
}
_MEMORY_OF_ALL = 40 << 30  # bytes that a machine has for 256 experts in each of two layers


@dataclass(frozen=True)
class Size:
    """How large what is measured is.

    Attributes:
        config: of the model, beside the layers.
        contexts: cached tokens before a step; at `context` whole layers and tokens are measured.
        prompts: tokens of prompts.
        experts: of a layer, where there is memory for all.
        fewer_experts: of a layer, where there is not.
    """

    config: dict[str, Any]
    contexts: tuple[int, ...]
    context: int
    prompts: tuple[int, ...]
    experts: int
    fewer_experts: int

    def experts_in(self, memory: int) -> int:
        """How many experts a layer has on a machine with so many bytes of memory."""
        return self.experts if memory >= _MEMORY_OF_ALL else self.fewer_experts


SIZES = {
    "glm-5.2": Size({}, (2048, 32768, 131072), 32768, (512, 2048), 256, 64),
    "small": Size(_SMALL, (32, 256), 256, (20, 40), 16, 16),
}


class Subject:
    """A model of one layer of each of `KINDS`, affine4 but for routers and indexers."""

    def __init__(self, size: Size, experts: int) -> None:
        self.size, self.bits = size, Bits(0)
        config = size.config | _LAYERS | {"n_routed_experts": experts}
        self.args = ModelArgs.from_dict(config)
        with CPU.active():
            self.model = Model(self.args)
            self.model.set_dtype(mx.bfloat16)
            self._fill()
            self.model.eval()
            mx.eval(self.model.parameters())

    def _fill(self) -> None:
        quantizes, packed = self.model.quant_predicate, []
        for path, module in self.model.named_modules():
            if isinstance(module, Router):
                module.weight = self.bits.floats(module.weight.shape, mx.bfloat16, -4)
            elif hasattr(module, "to_quantized") and quantizes(path, module):
                weight = self.bits.weight(module.weight.shape, FORMATS["affine4"], mx.bfloat16)
                packed.append((path, module.packed_class(weight, module)))
        self.model.update_modules(tree_unflatten(packed))

    def cache(self, tokens: int) -> list[Any]:
        """Caches that hold so many random tokens."""
        args, cache = self.args, self.model.make_cache()
        widths = (args.kv_lora_rank, args.qk_rope_head_dim), (args.index_head_dim, None)
        with CPU.active():
            for layer in cache:
                for entry, (rank, rope) in zip(layer.caches, widths, strict=False):
                    rows = self.floats(1, 1, tokens, rank)
                    ropes = None if rope is None else self.floats(1, 1, tokens, rope)
                    append(entry, rows, ropes, self.model.kv_format)
            mx.eval([entry.state for entry in cache])
        return cache

    def floats(self, *shape: int) -> mx.array:
        """Random bfloat16."""
        return self.bits.floats(shape, mx.bfloat16)


@contextmanager
def on(backend: Backend) -> Iterator[None]:
    """Within the block, MLX's default device is the backend's and ops run on it."""
    before = mx.default_device()
    mx.set_default_device(mx.gpu if backend.name == "metal" else mx.cpu)
    try:
        with backend.active():
            yield
    finally:
        backend.kernels_launched()  # the simulator keeps what it is not asked for
        mx.set_default_device(before)
