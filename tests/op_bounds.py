"""Runs every op with every size in turn 0, -1 or beyond an int.

It is a program of its own, as it may crash: ``python tests/op_bounds.py`` prints each case before
it runs, and how it ended after it.
"""

import itertools

import mlx.core as mx

from glm_fused import _ext, ops
from glm_fused.formats.weights import FORMATS

HUGE = 2**31 - 1


def view(*shape, dtype=mx.float32):
    """One value seen as an array of any shape, which takes no memory."""
    return mx.zeros(shape, dtype) if 0 in shape else mx.broadcast_to(mx.zeros(1, dtype), shape)


def weight(mode, *shape):
    *head, k = shape
    if mode == "dense":
        return ops.Weight.dense(view(*shape))
    codes = view(*head, k // 8, dtype=mx.uint32)
    return ops.Weight((codes, view(*head, k // 32, dtype=mx.uint8)), FORMATS["mxfp4"])


def moe(mode, tokens, top_k, bank, inner, hidden, **how):
    gate, down = weight(mode, bank, inner, hidden), weight(mode, bank, hidden, inner)
    slots, scores = view(tokens, top_k, dtype=mx.int32), view(tokens, top_k)
    return ops.moe_decode(view(tokens, hidden), gate, gate, down, slots, scores, **how)


def matvec(mode, heads, tokens, n, k, **how):
    flat = ops.quantized_matvec(view(tokens, k), weight(mode, n, k), **how)
    return flat, ops.quantized_matvec(view(heads, tokens, k), weight(mode, heads, n, k), **how)


def expert_matvec(mode, tokens, top_k, bank, n, k, **how):
    slots, w = view(tokens, top_k, dtype=mx.int32), weight(mode, bank, n, k)
    shared = ops.expert_matvec(view(tokens, k), w, slots, **how)
    return shared, ops.expert_matvec(view(tokens, top_k, k), w, slots, **how)


def router(tokens, hidden, experts, top_k, n_group, topk_group, **how):
    counts = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    return ops.router_topk(
        view(tokens, hidden), view(experts, hidden), view(experts), **counts, **how
    )


def indexer(batch, queries, heads, dim, keys, k, **how):
    q, weights = view(batch, queries, heads, dim), view(batch, queries, heads)
    return ops.indexer_topk(q, view(batch, keys, dim), weights, k, scale=1.0, **how)


def mla(batch, queries, heads, rank, rope, keys, k, **how):
    q = view(batch, queries, heads, max(rank, 0) + rope)
    latents = view(batch, keys, max(rank, 0))
    ropes = view(batch, keys, rope) if rope else None
    selected = None if k is None else view(batch, queries, k, dtype=mx.int32)
    return ops.sparse_mla_decode(q, latents, ropes, selected, rank=rank, scale=1.0, **how)


def norms(batch, tokens, n, **how):
    x, w = view(batch, tokens, n), view(n)
    return ops.rms_norm(x, w, 1e-5, **how), ops.layer_norm(x, w, w, 1e-5, **how)


def rotate(batch, heads, length, columns, pairs, **how):
    angles = view(1, 1, length, pairs)
    return ops.rotate(view(batch, heads, length, columns), angles, angles, **how)


GRIDS = {
    moe: (("dense", "mxfp4"), (0, 1, 3), (0, 2), (0, 2), (0, 64), (0, 64)),
    expert_matvec: (("dense", "mxfp4"), (0, 1, 3), (0, 2), (0, 2), (0, 8), (0, 64)),
    matvec: (("dense", "mxfp4"), (0, 2), (0, 1, 3), (0, 8), (0, 64)),
    router: ((0, 3), (0, 64), (0, 1, 8), (-1, 0, 2, HUGE), (-1, 0, 2, HUGE), (-1, 0, 1, HUGE)),
    indexer: ((0, 1), (0, 2), (0, 2), (0, 64), (0, 1, 5), (-1, 0, 1, 9)),
    norms: ((0, 2), (0, 3), (0, 1, 130)),
    rotate: ((0, 2), (0, 3), (0, 2), (0, 1, 8), (0, 4, 5)),
    mla: ((0, 1), (0, 2), (0, 2), (-1, 0, 64), (0, 32), (0, 1, 5), (None, 0, 3)),
}
BEYOND = {
    "rows of x": lambda: ops.quantized_matvec(view(2**30, 4, 64), weight("dense", 8, 64)),
    "tokens' choices": lambda: moe("dense", 2**16, 2**16, 2, 64, 64),
    "choices' values": lambda: moe("dense", 1, HUGE, 2, 64, 64),
    "tokens of a sum": lambda: ops.expert_sum(view(2**16, 2**16, 1), view(2**16, 2**16)),
    "rows of a norm": lambda: norms(2**16, 2**16, 1),
    "rows to rotate": lambda: rotate(2**11, 2**11, 2**11, 2, 1),
    "indexer's keys": lambda: indexer(1, 1, 2, 64, HUGE, 8),
    "indexer's heads": lambda: indexer(1, 1, 2**16, 2**16, 1, 8),
    "selected keys": lambda: indexer(1, 4, 2, 64, 4, HUGE),
    "latents": lambda: mla(1, 1, 2, 64, 0, HUGE, None),
    "packed width": lambda: ops.sparse_mla_decode(
        view(1, 1, 1, HUGE), view(1, 1, 100, dtype=mx.uint8), rank=HUGE - 2, scale=1.0
    ),
    "attention's heads": lambda: mla(1, 1, HUGE, 4, 0, 1, None),
    "a view": lambda: _ext.stream_read(view(1 << 30)),
}


def cases():
    """Yield (name, op, whether it has to be refused)."""
    for name, run in BEYOND.items():
        yield name, run, True
    for op, grid in GRIDS.items():
        for reference in (False, True):
            for sizes in itertools.product(*grid):
                name = f"{op.__name__}{sizes} reference={reference}"
                yield name, lambda o=op, s=sizes, r=reference: o(*s, reference=r), False
    for shape in ((0,), (2, 0), (), (5000,)):
        yield f"swiglu{shape}", lambda s=shape: ops.swiglu(view(*s), view(*s)), False
    for shape in itertools.product((0, 3), (0, 2), (0, 64)):
        yield f"sum{shape}", lambda s=shape: ops.expert_sum(view(*s), view(*s[:2])), False


def main():
    for name, run, refused in cases():
        print(name, end=": ", flush=True)
        try:
            result = run()
        except ValueError as error:
            print("refused,", error)
            continue
        mx.eval(result)
        for array in result if isinstance(result, tuple) else (result,):
            if mx.any(mx.isnan(array)).item():
                raise SystemExit(f"{name} gives NaN")
        if refused:
            raise SystemExit(f"{name} was not refused")
        print("fine")


if __name__ == "__main__":
    main()
