"""Which code runs a decode step: the routes of its ops, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

from .. import _ext
from ..formats.weights import Weight
from ..ops import paths, stock
from ..ops.routes import Kernel, Route, choose
from .config import ModelArgs
from .layer_spec import LayerSpec


def attention_routes(args: ModelArgs, layer: LayerSpec) -> list[Route]:
    """The routes of a layer's attention, for a query with at least ``index_topk`` keys."""
    routes = [choose("rms_norm"), _matvec_route(), choose("rotate")]
    routes.append(choose("sparse_mla_decode", args.index_topk))
    if layer.is_full:
        routes[1:1] = [choose("layer_norm"), choose("indexer_topk")]
    return routes


def mlp_routes(
    args: ModelArgs, layer: LayerSpec, weights: Iterable[Weight | None] = ()
) -> list[Route]:
    """The routes of the ops of a layer's MLP, for one token.

    ``weights`` are its gate, up and down, as far as they are known.
    """
    stock_ops = stock.takes(*(w for w in weights if w is not None))
    if not layer.is_sparse:
        return [_matvec_route(stock_ops)]
    experts = choose("moe_decode", 1, args.num_experts_per_tok, stock_ops=stock_ops)
    return [choose("router_topk", layer.experts), experts]


def _matvec_route(stock_ops: bool = True) -> Route:
    """The route of a layer's matrices, which on Metal are part of blocks."""
    if choose("rms_norm").kernel is Kernel.metal:
        return Route("quantized_matvec", Kernel.metal)
    return choose("quantized_matvec", stock_ops=stock_ops)


def path_taken(args: ModelArgs, layers: Iterable[LayerSpec] | None = None) -> str:
    """Name the path taken: "reference", "fused", or "fused, but …" with what falls back and why.

    It is that of ``layers``, or of all that the model has.
    """
    if paths.use_reference():
        return "reference"
    routes = [
        route
        for layer in (args.layers if layers is None else layers)
        for route in (*attention_routes(args, layer), *mlp_routes(args, layer))
    ]
    fallen = dict.fromkeys(str(route) for route in routes if route.fell_back)
    return f"fused, but {', '.join(fallen)}" if fallen else "fused"


def explain(routes: Iterable[Route]) -> str:
    """Say which code runs which ops; the CPU's kernels are named with their instruction set."""
    ops: dict[str, list[str]] = {}
    for route in dict.fromkeys(routes):
        code = route.kernel.name
        if route.kernel is Kernel.cpu:
            code += f" ({_ext.cpu_kernels()}, {_ext.num_threads()} threads)"
        if route.reason:
            code += f" ({route.reason})"
        ops.setdefault(code, []).append(route.op)
    return "; ".join(f"{code}: {', '.join(names)}" for code, names in ops.items())
