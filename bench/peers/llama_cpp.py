"""Calls llama.cpp's long-context ops in this process: the chain that it builds for GLM-5's DSA.

It needs the shared libraries of llama.cpp's `ggml` folder (b11434 was used):

    cmake -S ggml -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON
    cmake --build build

Caches are fp16, as they are there by default. Queries are those of the last cached tokens.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, F16, I32 = 0, 1, 26  # enum ggml_type
ACCUMULATE_F32 = 10  # GGML_PREC_F32
TENSORS = 64  # more than a graph here has


class InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class Library:
    """The functions that are used, by name: ``call("ggml_add", pointer, …)`` returns a pointer."""

    def __init__(self, folder: Path, threads: int) -> None:
        # They are loaded in the order in which they need one another.
        names = ("libggml-base.so", "libggml-cpu.so")
        paths = [next(folder.rglob(name), None) for name in names]
        if None in paths:
            raise SystemExit(f"{folder} does not hold {' and '.join(names)}.")
        self._libraries = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in paths]
        self.version = self._text("ggml_version")
        self.backend = self("ggml_backend_cpu_init")
        self("ggml_backend_cpu_set_n_threads", self.backend, ctypes.c_int(threads))

    def _find(self, name: str) -> Any:
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise SystemExit(f"ggml has no {name}: a version with GGML_OP_LIGHTNING_INDEXER is needed.")

    def _text(self, name: str) -> str:
        function = self._find(name)
        function.restype = ctypes.c_char_p
        return str(function().decode())

    def __call__(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        function = self._find(name)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*arguments))


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


class Graph:
    """Tensors, and the nodes between them, in memory of their own."""

    def __init__(self, ggml: Library) -> None:
        self.ggml = ggml
        node = self._count("ggml_tensor_overhead") + self._count("ggml_graph_overhead")
        self.context = ggml("ggml_init", InitParams(TENSORS * node, None, True))
        self.graph = ggml("ggml_new_graph", self.context)

    def _count(self, name: str) -> int:
        return self.ggml(name).value or 0

    def tensor(self, kind: int, *shape: int) -> ctypes.c_void_p:
        """A new tensor; ``shape`` has the fastest dimension first, as in ggml."""
        shape = shape + (1,) * (4 - len(shape))
        return self.ggml("ggml_new_tensor_4d", self.context, ctypes.c_int(kind), *sizes(*shape))

    def view(self, a: ctypes.c_void_p, shape: list[int], strides: list[int]) -> ctypes.c_void_p:
        """A view of ``a``; ``strides`` are in bytes, for all dimensions but the first."""
        bytes_of = [ctypes.c_size_t(stride) for stride in (*strides, 0)]
        return self.node("ggml_view_4d", a, *sizes(*shape), *bytes_of)

    def node(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        return self.ggml(name, self.context, *arguments)

    def finish(self, result: ctypes.c_void_p) -> None:
        """End the graph with ``result`` and allocate all tensors."""
        self.ggml("ggml_build_forward_expand", self.graph, result)
        self.ggml("ggml_backend_alloc_ctx_tensors", self.context, self.ggml.backend)

    def write(self, tensor: ctypes.c_void_p, values: NDArray[Any]) -> None:
        self._copy("ggml_backend_tensor_set", tensor, np.ascontiguousarray(values))

    def read(self, tensor: ctypes.c_void_p, out: NDArray[Any]) -> NDArray[Any]:
        """Copy a tensor's values to ``out``, and return it."""
        self._copy("ggml_backend_tensor_get", tensor, out)
        return out

    def _copy(self, name: str, tensor: ctypes.c_void_p, values: NDArray[Any]) -> None:
        offset, size = ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes)
        self.ggml(name, tensor, ctypes.c_void_p(values.ctypes.data), offset, size)

    def run(self) -> None:
        self.ggml("ggml_backend_graph_compute", self.ggml.backend, self.graph)


def causal_mask(tokens: int, context: int) -> NDArray[np.float16]:
    """What is added to scores [tokens, context]: minus infinity for keys that follow the query."""
    mask = np.zeros((tokens, context), np.float16)
    for i, row in enumerate(mask):
        row[context - tokens + i + 1 :] = -np.inf
    return mask


class TopK(Graph):
    """A graph of the indices of the ``topk`` largest of each row of scores [rows, count]."""

    def __init__(self, ggml: Library, scores: NDArray[np.float32], topk: int) -> None:
        super().__init__(ggml)
        rows, count = scores.shape
        self.shape = (rows, topk)
        given = self.tensor(F32, count, rows)
        self.best = self.node("ggml_cont", self.node("ggml_top_k", given, ctypes.c_int(topk)))
        self.finish(self.best)
        self.write(given, scores)

    def selected(self) -> NDArray[np.int32]:
        """The places [rows, topk] of the largest, in no order."""
        self.run()
        return self.read(self.best, np.empty(self.shape, np.int32))


class Indexer(Graph):
    """A graph of the scores of all keys and the indices of the ``topk`` largest, in no order."""

    def __init__(
        self,
        ggml: Library,
        q: NDArray[np.float32],  # [tokens, heads, dim]
        keys: NDArray[np.float16],  # [context, dim]
        weights: NDArray[np.float32],  # [tokens, heads], with the scale
        topk: int,
    ) -> None:
        super().__init__(ggml)
        (context, dim), (tokens, heads) = keys.shape, weights.shape
        inputs = [
            (self.tensor(F32, dim, heads, tokens), q),
            (self.tensor(F16, dim, 1, context), keys),
            (self.tensor(F32, heads, tokens), weights),
            (self.tensor(F16, context, tokens), causal_mask(tokens, context)),
        ]
        scores = self.node("ggml_lightning_indexer", *(tensor for tensor, _ in inputs))
        self.shape = (tokens, topk)
        self.best = self.node("ggml_cont", self.node("ggml_top_k", scores, ctypes.c_int(topk)))
        self.finish(self.best)
        for tensor, values in inputs:
            self.write(tensor, values)

    def selected(self) -> NDArray[np.int32]:
        """The keys [tokens, topk] that it has selected."""
        return self.read(self.best, np.empty(self.shape, np.int32))


class Attention(Graph):
    """A graph of a mask that lets the selected keys through, and flash attention over all keys."""

    def __init__(
        self,
        ggml: Library,
        q: NDArray[np.float32],  # [tokens, heads, rank + rope]
        rows: NDArray[np.float16],  # [context, rank + rope]
        selected: NDArray[np.int32],  # [tokens, topk]
        rank: int,
        scale: float,
    ) -> None:
        super().__init__(ggml)
        (context, width), (tokens, heads, _), topk = rows.shape, q.shape, selected.shape[1]
        queries, keys = self.tensor(F32, width, tokens, heads), self.tensor(F16, width, context)
        mask, best = self.tensor(F16, context, tokens), self.tensor(I32, topk, tokens)
        hidden = self.node("ggml_fill", mask, ctypes.c_float(float("-inf")))
        size = 2 * context * tokens
        hidden = self.view(hidden, [1, context, tokens, 1], [2, 2 * context, size])
        zeros = self.tensor(F32, 1, topk, tokens)
        zeros = self.node("ggml_fill", zeros, ctypes.c_float(0))
        seen = self.node("ggml_set_rows", hidden, zeros, best)
        seen = self.view(seen, [context, tokens, 1, 1], [2 * context, size, size])
        seen = self.node("ggml_add", seen, mask)
        values = self.view(keys, [rank, context, 1, 1], [2 * width, *[2 * width * context] * 2])
        floats = [ctypes.c_float(value) for value in (scale, 0, 0)]
        self.out = self.node("ggml_flash_attn_ext", queries, keys, values, seen, *floats)
        ggml("ggml_flash_attn_ext_set_n_kv_max", self.out, ctypes.c_int32(topk))
        ggml("ggml_prec_set_acc", self.out, ctypes.c_int(ACCUMULATE_F32))
        self.finish(self.out)
        self.shape = (tokens, heads, rank)
        for tensor, data in ((queries, q.swapaxes(0, 1)), (keys, rows), (best, selected)):
            self.write(tensor, data)
        self.write(mask, causal_mask(tokens, context))

    def result(self) -> NDArray[np.float32]:
        return self.read(self.out, np.empty(self.shape, np.float32))
