"""Which code runs a decode step: the routes of its ops, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

from .. import _ext
from ..ops import paths
from ..ops.routes import Kernel, Route, choose
from .config import ModelArgs


def attention_routes(args: ModelArgs, layer: int) -> list[Route]:
    """Of the ops of a layer's attention once a query has as many keys as it may select."""
    routes = [choose("quantized_matvec"), choose("sparse_mla_decode", args.index_topk)]
    return [choose("indexer_topk"), *routes] if args.is_full(layer) else routes


def mlp_routes(args: ModelArgs, layer: int) -> list[Route]:
    """Of the ops of a layer's MLP, for one token."""
    if not args.is_sparse(layer):
        return [choose("quantized_matvec")]
    experts, top_k = args.n_routed_experts or 0, args.num_experts_per_tok
    return [choose("router_topk", experts), choose("moe_decode", 1, top_k)]


def path_taken(args: ModelArgs) -> str:
    """ "reference", "fused", or "fused, but …" with the ops that fall back and why."""
    if paths.use_reference():
        return "reference"
    routes = [
        route
        for layer in range(args.num_hidden_layers)
        for route in (*attention_routes(args, layer), *mlp_routes(args, layer))
    ]
    fallen = dict.fromkeys(str(route) for route in routes if route.fell_back)
    return f"fused, but {', '.join(fallen)}" if fallen else "fused"


def explain(routes: Iterable[Route]) -> str:
    """The code that runs, and for which ops; the CPU's kernels with their instruction set."""
    ops: dict[str, list[str]] = {}
    for route in dict.fromkeys(routes):
        code = route.kernel.name
        if route.kernel is Kernel.cpu:
            code += f" ({_ext.cpu_kernels()}, {_ext.num_threads()} threads)"
        if route.reason:
            code += f" ({route.reason})"
        ops.setdefault(code, []).append(route.op)
    return "; ".join(f"{code}: {', '.join(names)}" for code, names in ops.items())
