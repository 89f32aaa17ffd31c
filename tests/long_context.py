"""Inputs of the long-context ops, and their results on every instruction set."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
from formats_under_test import bits_of

from glm_fused import _ext, ops
from glm_fused.formats import kv_rows

KEY_FORMATS = ["bf16", "fp16", "fp32", "fp8", "int8"]


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype=mx.float32) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)


def random_rows(
    rng: np.random.Generator, kv_format: str, b: int, total: int, rank: int, rope: int
) -> tuple[mx.array, mx.array | None]:
    """Cached rows [b, total, …] of a format, and their RoPE keys where these are kept apart."""
    latents, ropes = random(rng, (b, total, rank)), random(rng, (b, total, rope))
    if kv_format in kv_rows.PACKED:
        return kv_rows.pack(latents, ropes if rope else None, kv_format), None
    dtype = kv_rows.FLOATS[kv_format]
    return latents.astype(dtype), ropes.astype(dtype) if rope else None


def digest(op: str) -> str:
    """A digest of the op's results over every format."""
    made = hashlib.sha256()
    rng = np.random.default_rng(12)
    for kv_format in KEY_FORMATS:
        for total, rank, rope in ((130, 128, 32), (517, 100, 17)):
            keys, ropes = random_rows(rng, kv_format, 2, total, rank, rope if op == "mla" else 0)
            heads = int(rng.integers(1, 30))
            if op == "mla":
                q = random(rng, (2, 3, heads, rank + rope), mx.bfloat16)
                out = ops.sparse_mla_decode(q, keys, ropes, rank=rank, scale=0.1).view(mx.int32)
            else:
                q = random(rng, (2, 3, heads, rank), mx.bfloat16)
                out = ops.indexer_topk(q, keys, random(rng, (2, 3, heads)), 64, scale=0.1)
            made.update(bits_of(out.view(mx.uint32)).tobytes())
    return made.hexdigest()


@functools.cache
def digests(op: str) -> dict[str, str]:
    """The digest with each instruction set that this processor has."""
    best = _ext.cpu_kernels()
    names = ["avx512", "avx2", "portable"]
    found = {best: digest(op)}
    for name in names[names.index(best) + 1 :]:
        run = subprocess.run(
            [sys.executable, __file__, op],
            env={**os.environ, "GLM_FUSED_KERNELS": name, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        kernels, found[name] = run.stdout.split()
        assert kernels == name
    return found


if __name__ == "__main__":
    print(_ext.cpu_kernels(), digest(sys.argv[1]))
