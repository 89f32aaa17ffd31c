"""A layer's routed experts for one token in llama.cpp, repacked as it loads them; random codes."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .llama_cpp import F32, I32, Graph, InitParams, Library


class Kind(NamedTuple):
    """A type of llama.cpp's: its number, its block, and the bytes of it that are fp16 scales."""

    number: int
    columns: int
    bytes: int
    scales: int
    repacked: bool


KINDS = {
    "Q4_0": Kind(2, 32, 18, 2, True),
    "Q4_K": Kind(12, 256, 144, 4, True),
    "IQ4_NL": Kind(20, 32, 18, 2, True),
    "MXFP4": Kind(39, 32, 17, 0, True),
    "Q8_0": Kind(8, 32, 34, 2, False),
    "Q6_K": Kind(14, 256, 210, 0, False),
    "IQ1_M": Kind(29, 256, 56, 0, False),
    "IQ2_XXS": Kind(16, 256, 66, 2, False),
    "IQ3_XXS": Kind(18, 256, 98, 2, False),
    "BF16": Kind(30, 1, 2, 2, False),
}
# Those with the bits a weight of ours, and GGUF's own.
PEERS = {
    "affine4": ("Q4_0", "Q4_K", "IQ4_NL"),
    "mxfp4": ("MXFP4",),
    "affine8": ("Q8_0",),
    "bf16": ("BF16",),
    "ggml-mxfp4": ("MXFP4",),
    **{name.lower(): (name,) for name in KINDS if name not in ("MXFP4", "BF16")},
}


class Experts(Graph):
    """Gate, up, SwiGLU, down and the weighted sum of `top_k` of `bank` experts, for one token."""

    def __init__(
        self, ggml: Library, name: str, hidden: int, intermediate: int, bank: int, top_k: int
    ) -> None:
        super().__init__(ggml)
        kind = KINDS[name]
        self.top_k, self.bank = top_k, bank
        self.held = ggml("ggml_init", InitParams(1 << 16, None, True))
        shapes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
        gate, up, down = (
            ggml(
                "ggml_new_tensor_3d",
                self.held,
                ctypes.c_int(kind.number),
                *(ctypes.c_int64(size) for size in (k, n, bank)),
            )
            for k, n in shapes
        )
        buffers = repacking(ggml) if kind.repacked else ggml("ggml_backend_cpu_buffer_type")
        ggml("ggml_backend_alloc_ctx_tensors_from_buft", self.held, buffers)
        for tensor, (k, n) in zip((gate, up, down), shapes, strict=True):
            self.write(tensor, random_codes(kind, k * n * bank))
        x, self.ids = self.tensor(F32, hidden, 1), self.tensor(I32, top_k, 1)
        scores = self.tensor(F32, 1, top_k)
        g, u = (self.node("ggml_mul_mat_id", w, x, self.ids) for w in (gate, up))
        h = self.node("ggml_swiglu_split", g, u)
        y = self.node("ggml_mul", self.node("ggml_mul_mat_id", down, h, self.ids), scores)
        total = None
        for j in range(top_k):
            one = self.node(
                "ggml_view_1d", y, ctypes.c_int64(hidden), ctypes.c_size_t(4 * hidden * j)
            )
            total = one if total is None else self.node("ggml_add", total, one)
        assert total is not None
        self.finish(total)
        self.write(x, np.random.default_rng(0).standard_normal(hidden).astype(np.float32))
        self.write(scores, np.full(top_k, 0.125, np.float32))

    def route(self, rng: np.random.Generator) -> None:
        """Choose other experts."""
        self.write(self.ids, rng.permutation(self.bank)[: self.top_k].astype(np.int32))

    def free(self) -> None:
        for context in (self.held, self.context):
            self.ggml("ggml_free", context)


def repacking(ggml: Library) -> ctypes.c_void_p:
    """The buffers in which llama.cpp lays weights out as its fastest kernels want them."""
    registry = ggml("ggml_backend_cpu_reg")
    address = ggml(
        "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
    )
    assert address.value is not None
    list_of = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address.value)
    found = list_of(ggml("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0)))
    for i in range(8):
        if not found[i]:
            break
        name = ctypes.string_at(ggml("ggml_backend_buft_name", ctypes.c_void_p(found[i])))
        if b"REPACK" in name:
            return ctypes.c_void_p(found[i])
    raise SystemExit("ggml has no buffers of repacked weights.")


def random_codes(kind: Kind, weights: int) -> NDArray[np.uint8]:
    """Blocks of random codes whose scales are small numbers."""
    blocks = weights // kind.columns
    codes = np.random.default_rng(1).integers(0, 64, (blocks, kind.bytes), np.uint8)
    if kind.scales:
        codes[:, : kind.scales].view(np.uint16)[:] = 0x2000
    return codes
