"""The self-test's cases of whole decoder layers, whose kernels do what several ops do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import CacheList, KVCache

from ..formats.weights import FORMATS, Format, dense_format
from ..models.cache import Span, append
from ..models.config import ModelArgs
from ..models.layer import DecoderLayer as Layer
from ..models.layers import LayerNorm, RMSNorm
from ..models.moe import Router
from ..ops import paths
from .case import Arrays, Case
from .synthetic import DTYPES, Bits

CACHED = 100  # keys, of which a query selects `index_topk`
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 192,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
    "num_hidden_layers": 2,
    "indexer_types": ["full", "shared"],
}


@dataclass(frozen=True)
class DecoderLayer(Case):
    """A layer with new tokens after `CACHED` keys; `fmt` None stands for the tokens' dtype."""

    fmt: Format | None
    full: bool
    sparse: bool
    kv_format: str = "auto"

    op = "decoder_layer"

    def label(self) -> str:
        kind = "full" if self.full else "shared", "sparse" if self.sparse else "dense"
        cache = () if self.kv_format == "auto" else (f"{self.kv_format}_cache",)
        return "-".join((self.fmt.name if self.fmt else "dense", *kind, *cache))

    def arguments(self) -> dict[str, Any]:
        bits, dtype, n = self.bits(), DTYPES[self.dtype], self.tokens
        kinds = ["sparse" if self.sparse else "dense"] * 2
        args = ModelArgs.from_dict(SIZES | {"mlp_layer_types": kinds})
        layer = Layer(args, args.layers[0 if self.full else 1])
        _fill(layer, bits, self.fmt, dtype)
        widths = args.kv_lora_rank, args.qk_rope_head_dim, args.index_head_dim
        angles = (1, 1, n, args.qk_rope_head_dim // 2)
        chosen = np.sort(bits.choices(n, args.index_topk, CACHED), axis=1)
        return {
            "layer": layer,
            "x": bits.floats((1, n, args.hidden_size), dtype),
            "angles": tuple(bits.floats(angles, mx.float32, -1) for _ in range(2)),
            "cached": [bits.floats((1, 1, CACHED, width), dtype) for width in widths],
            "selection": None if self.full else mx.array(chosen[None]),
        }

    def call(self, arguments: dict[str, Any], reference: bool) -> Arrays:
        latents, ropes, keys = arguments["cached"]
        cache = CacheList(KVCache(), KVCache()) if self.full else CacheList(KVCache())
        with paths.reference_path(reference):
            append(cache[0], latents, ropes, self.kv_format)
            if self.full:
                append(cache[1], keys, None, self.kv_format)
            span, x = Span.of([cache], self.tokens), arguments["x"]
            out, selection = arguments["layer"](
                x, span, arguments["angles"], cache, arguments["selection"]
            )
        rows = cache[0].keys[:, :, : span.total]
        # Packed rows are codes, and no floats that may differ by ulps.
        rows = rows if self.kv_format == "auto" else mx.contiguous(rows).view(mx.int8)
        return out, *([selection] if self.full else []), rows


def _fill(layer: nn.Module, bits: Bits, fmt: Format | None, dtype: mx.Dtype) -> None:
    """Give a layer weights of random bits: matrices in `fmt`, but for the router and the norms."""
    packed = []
    for path, module in sorted(layer.named_modules(), key=lambda item: str(item[0])):
        if isinstance(module, Router):
            module.weight = bits.floats(module.weight.shape, mx.float32, -4)
            module.e_score_correction_bias = bits.floats(module.weight.shape[:1], mx.float32, -3)
        elif isinstance(module, RMSNorm | LayerNorm):
            module.weight = bits.floats(module.weight.shape, dtype)
            if "bias" in module:
                module.bias = bits.floats(module.weight.shape, dtype)
        elif hasattr(module, "packed_class"):
            if fmt is None:
                dense = dense_format(dtype)
                module.weight = bits.weight(module.weight.shape, dense, dtype).planes[0]
            else:
                weight = bits.weight(module.weight.shape, fmt, dtype)
                packed.append((path, module.packed_class(weight, module)))
    layer.update_modules(tree_unflatten(packed))


def layer_cases(quick: bool) -> list[Case]:
    """A layer of each kind, and one with a packed cache.

    Not in quick runs: of other formats, types and numbers of tokens.
    """
    affine4 = FORMATS["affine4"]
    made: list[Case] = [
        DecoderLayer("bfloat16", 1, affine4, full=True, sparse=True),
        DecoderLayer("bfloat16", 1, affine4, full=False, sparse=True),
        DecoderLayer("bfloat16", 1, affine4, full=True, sparse=False),
        DecoderLayer("bfloat16", 1, affine4, full=True, sparse=True, kv_format="fp8"),
    ]
    if not quick:
        made += [
            DecoderLayer("bfloat16", 16, affine4, full=True, sparse=True),
            DecoderLayer("bfloat16", 3, FORMATS["mxfp4"], full=False, sparse=True),
            DecoderLayer("bfloat16", 2, FORMATS["fp8"], full=True, sparse=True),
            DecoderLayer("float16", 2, affine4, full=True, sparse=False),
            DecoderLayer("float32", 4, None, full=True, sparse=True),
            DecoderLayer("bfloat16", 3, affine4, full=True, sparse=False, kv_format="int8"),
        ]
    return made
