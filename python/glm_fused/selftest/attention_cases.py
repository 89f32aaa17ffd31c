"""The self-test's cases of indexer_topk and sparse_mla_decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import kv_rows
from ..host import to_numpy
from .case import Case
from .synthetic import DTYPES, Bits

KV_FORMATS = (*kv_rows.FLOATS, *kv_rows.PACKED)


def cached_rows(
    bits: Bits, kv_format: str, count: int, rank: int, rope: int
) -> tuple[mx.array, mx.array | None]:
    """Cached rows [1, count, …] of random bits, and RoPE keys where a format keeps them apart."""
    if kv_format in kv_rows.FLOATS:
        dtype = kv_rows.FLOATS[kv_format]
        latents, ropes = (bits.floats((1, count, w), dtype) for w in (rank, rope))
        return latents, ropes if rope else None
    codes = bits.words(count, rank).astype(np.uint8)
    if kv_format == "fp8":
        codes &= np.uint8(0xBF)  # no NaN codes
    scales = (kv_rows.row_bytes(kv_format, rank, 0) - rank) // 4
    top = 0 if kv_format == "fp8" else -7
    parts = (
        mx.abs(bits.floats((count, scales), mx.float32, top)).view(mx.uint8),
        bits.floats((count, rope), mx.bfloat16).view(mx.uint8),
    )
    packed = np.concatenate([codes, *(to_numpy(p) for p in parts)], axis=1)
    return mx.array(packed[None]).view(kv_rows.PACKED[kv_format]), None


@dataclass(frozen=True)
class SparseMlaDecode(Case):
    kv_format: str
    heads: int
    rank: int
    rope: int
    keys: int
    top_k: int  # 0: every visible key

    op = "sparse_mla_decode"

    def label(self) -> str:
        of = f"top{self.top_k}of{self.keys}" if self.top_k else f"all{self.keys}"
        return f"{self.kv_format}-{of}-{self.heads}x{self.rank}+{self.rope}"

    def arguments(self) -> dict[str, Any]:
        bits = self.bits()
        latents, ropes = cached_rows(bits, self.kv_format, self.keys, self.rank, self.rope)
        q = (1, self.tokens, self.heads, self.rank + self.rope)
        selected = None
        if self.top_k:
            chosen = np.sort(bits.choices(self.tokens, self.top_k, self.keys), axis=1)
            selected = mx.array(chosen[None])
        return {
            "q": bits.floats(q, DTYPES[self.dtype], -2),
            "latents": latents,
            "ropes": ropes,
            "selected": selected,
            "rank": self.rank,
            "scale": 0.125,
        }

    def sizes(self) -> tuple[int, ...]:
        return (self.top_k or self.keys,)


@dataclass(frozen=True)
class IndexerTopk(Case):
    kv_format: str
    heads: int
    dim: int
    keys: int
    top_k: int

    op = "indexer_topk"

    def label(self) -> str:
        return f"{self.kv_format}-top{self.top_k}of{self.keys}-{self.heads}x{self.dim}"

    def arguments(self) -> dict[str, Any]:
        bits = self.bits()
        keys, _ = cached_rows(bits, self.kv_format, self.keys, self.dim, 0)
        heads = (1, self.tokens, self.heads)
        return {
            "q": bits.floats((*heads, self.dim), DTYPES[self.dtype]),
            "keys": keys,
            "weights": bits.floats(heads, mx.float32),
            "k": self.top_k,
            "scale": 0.125,
        }


def attention_cases(quick: bool) -> list[Case]:
    """The cases of every cache format; not in quick runs: more tokens, odd sizes, GLM-5's own."""
    made: list[Case] = [SparseMlaDecode("bfloat16", 1, f, 4, 128, 32, 200, 130) for f in KV_FORMATS]
    made += [IndexerTopk("bfloat16", 1, f, 4, 64, 700, 64) for f in KV_FORMATS]
    if not quick:
        made += [
            SparseMlaDecode("float32", 3, "bf16", 5, 97, 31, 150, 70),
            SparseMlaDecode("float16", 2, "fp16", 3, 64, 0, 130, 0),
            SparseMlaDecode("bfloat16", 1, "bf16", 64, 512, 64, 2500, 2048),
            SparseMlaDecode("bfloat16", 1, "fp8", 64, 512, 64, 2500, 2048),
            IndexerTopk("float32", 3, "fp32", 33, 17, 400, 130),
            IndexerTopk("float16", 2, "fp16", 1, 1, 300, 299),
            IndexerTopk("bfloat16", 1, "bf16", 32, 128, 5000, 2048),
            IndexerTopk("bfloat16", 1, "fp8", 32, 128, 5000, 2048),
        ]
    return made
