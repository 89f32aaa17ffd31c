"""Both paths agree on arrays of any shape, type, stride and content, in the ops and the model."""

import random
import resource
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np
from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _model

from glm_fused import ops
from glm_fused.formats.weights import FORMATS as KNOWN
from glm_fused.formats.weights import quantized_format
from glm_fused.loader import load_model

NAME = "arrays"
TIMEOUT = 120  # the reference takes long for a model of thousands of rows
SLOW_CASES = 4000
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
TYPES = [*FLOATS, mx.int32, mx.uint32, mx.int64, mx.uint8, mx.bool_, mx.int8, mx.complex64]
FORMATS = [
    ("dense", 0, 0), ("affine", 64, 4), ("affine", 32, 8), ("affine", 128, 3), ("mxfp4", 32, 4),
    ("mxfp8", 32, 8), ("nvfp4", 16, 4),
]  # fmt: skip
SIZES = [0, 1, 2, 3, 5, 17, 32, 64, 100, 5000]
NUMBERS = [0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**31, 2**63, 2**64, 10**400]
SCALES = [0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan"), 10**400]


def prepare(folder):
    """Make a model for the calls of it, and allow no more than a few GB of memory."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
    prepare.model = load_model(_model.write(folder / "good"))[0]


def floats(rng, *shape, dtype=None):
    """An array of normal numbers, at times with NaN, infinities and zeros among them."""
    x = np.random.default_rng(rng.getrandbits(32)).normal(size=shape).astype(np.float32)
    if rng.random() < 0.15 and x.size:
        for _ in range(rng.randrange(1, 4)):
            special = rng.choice([np.nan, np.inf, -np.inf, 0, -0.0, 3e38, 1e-40])
            x.reshape(-1)[rng.randrange(x.size)] = special
    return mx.array(x).astype(dtype or rng.choice(FLOATS))


def integers(rng, low, high, *shape):
    """An array of integers, mostly within [low, high) and at times far outside."""
    x = np.random.default_rng(rng.getrandbits(32)).integers(low, max(high, low + 1), shape)
    if rng.random() < 0.15 and x.size:
        outside = rng.choice([-1, high, high + 1, 2**31 - 1, -(2**31)])
        x.reshape(-1)[rng.randrange(x.size)] = outside
    return mx.array(x.astype(np.int32))


def weight(rng, *shape):
    """A weight in any format."""
    mode, group, bits = rng.choice(FORMATS)
    w = floats(rng, *shape, dtype=mx.bfloat16)
    if mode == "dense":
        return ops.Weight.dense(w)
    fmt = quantized_format(group, bits, mode)
    return ops.Weight(mx.quantize(w, **fmt.parameters), fmt)


def start_of(rng, b, t):
    """The padding in front of each sequence, or None."""
    return integers(rng, 0, t, b) if rng.random() < 0.3 else None


def matvec(rng):
    """A call of quantized_matvec."""
    k, n, heads = rng.choice([128, 256]), rng.choice([1, 8, 40]), rng.choice([0, 0, 3])
    shape = (heads,) if heads else ()
    x = floats(rng, *shape, rng.choice([1, 2, 5]), k)
    return ops.quantized_matvec, {"x": x, "w": weight(rng, *shape, n, k)}


def moe(rng):
    """A call of moe_decode."""
    tokens, top_k, experts = rng.choice([1, 3]), rng.choice([1, 2]), 4
    hidden, wide = 128, rng.choice([128, 256])
    return ops.moe_decode, {
        "x": floats(rng, tokens, hidden),
        "gate": weight(rng, experts, wide, hidden),
        "up": weight(rng, experts, wide, hidden),
        "down": weight(rng, experts, hidden, wide),
        "slots": integers(rng, 0, experts, tokens, top_k),
        "scores": floats(rng, tokens, top_k),
    }


def router(rng):
    """A call of router_topk."""
    experts, tokens = rng.choice([4, 8, 24]), rng.choice([1, 4])
    groups = rng.choice([1, 1, 2])
    return ops.router_topk, {
        "x": floats(rng, tokens, 64),
        "weight": floats(rng, experts, 64),
        "correction_bias": floats(rng, experts),
        "top_k": rng.choice([1, 2]),
        "n_group": groups,
        "topk_group": 1,
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": 2.5,
    }


def indexer(rng):
    """A call of indexer_topk."""
    b, t, heads, dim = rng.choice([1, 2]), rng.choice([1, 9, 70]), rng.choice([1, 4]), 64
    length = min(t, rng.choice([1, 2, 6]))
    return ops.indexer_topk, {
        "q": floats(rng, b, length, heads, dim),
        "keys": floats(rng, b, t, dim),
        "weights": floats(rng, b, length, heads),
        "k": rng.choice([1, 4, 16]),
        "scale": 0.125,
        "start": start_of(rng, b, t),
    }


def attention(rng):
    """A call of sparse_mla_decode."""
    b, t, heads, rank, rope = 1, rng.choice([1, 9, 70]), rng.choice([1, 4]), 64, 32
    length = min(t, rng.choice([1, 2, 6]))
    selected = integers(rng, -1, t, b, length, rng.choice([1, 5])) if rng.random() < 0.7 else None
    return ops.sparse_mla_decode, {
        "q": floats(rng, b, length, heads, rank + rope),
        "latents": floats(rng, b, t, rank),
        "ropes": floats(rng, b, t, rope),
        "selected": selected,
        "rank": rank,
        "scale": 0.1,
        "start": start_of(rng, b, t),
    }


def swiglu(rng):
    """A call of swiglu, which has one path."""
    shape, dtype = (rng.choice([1, 3]), 64), rng.choice(FLOATS)
    return ops.swiglu, {
        "gate": floats(rng, *shape, dtype=dtype),
        "up": floats(rng, *shape, dtype=dtype),
    }


def expert_sum(rng):
    """A call of expert_sum, which has one path."""
    tokens, top_k = rng.choice([1, 3]), rng.choice([1, 2])
    return ops.expert_sum, {
        "y": floats(rng, tokens, top_k, 64),
        "scores": floats(rng, tokens, top_k),
    }


def rms_norm(rng):
    """A call of rms_norm."""
    n = rng.choice([1, 64, 130])
    shape = rng.choice([(n,), (3, n), (2, 1, 5, n), (1, 2, 1, 3, 1, n)])
    return ops.rms_norm, {
        "x": floats(rng, *shape),
        "weight": floats(rng, n),
        "eps": rng.choice([1e-5, 0.1]),
    }


def layer_norm(rng):
    """A call of layer_norm."""
    _, arguments = rms_norm(rng)
    bias = floats(rng, *arguments["weight"].shape)
    return ops.layer_norm, {**arguments, "bias": bias}


def rotate(rng):
    """A call of rotate."""
    b, h, length, pairs = rng.choice([1, 2]), rng.choice([1, 4]), rng.choice([1, 6]), 8
    angles = (rng.choice([1, b]), 1, length, pairs)
    return ops.rotate, {
        "x": floats(rng, b, h, length, 2 * pairs + rng.choice([0, 5])),
        "cos": floats(rng, *angles, dtype=mx.float32),
        "sin": floats(rng, *angles, dtype=mx.float32),
        "interleaved": rng.random() < 0.5,
    }


def model(rng):
    """A call of the model, with a fresh cache."""
    tokens = integers(rng, 0, 256, 1, rng.choice([1, 3, 20]))

    def call(tokens, reference):
        if tokens.ndim == 2 and 100 < tokens.size <= 4096:  # the reference path takes its time
            tokens = tokens[:2, :20]
        with ops.paths.reference_path(reference):
            return prepare.model(tokens, prepare.model.make_cache())

    return call, {"tokens": tokens}


CALLS = [
    matvec, moe, router, indexer, attention, swiglu, expert_sum, rms_norm, layer_norm, rotate, model
]  # fmt: skip


def spoil(rng, value):
    """Another array, weight or number in the place of one that fits."""
    if isinstance(value, ops.Weight):
        planes = list(value.planes)
        change = rng.randrange(6)
        if change == 0:
            return value._replace(format=rng.choice([*KNOWN.values(), None, "affine4", 4]))
        if change == 1:
            return value._replace(planes=rng.choice([None, planes[0], [], planes[1:], planes * 2]))
        at = rng.randrange(len(planes))
        planes[at] = spoil(rng, planes[at])
        return value._replace(planes=planes)
    if isinstance(value, mx.array):
        return spoil_array(rng, value)
    if isinstance(value, bool):
        return not value
    if value is None:
        return None
    return rng.choice(SCALES if isinstance(value, float) else NUMBERS)


def affordable(name, value):
    """A smaller `k` in place of 2^31 - 1, which is valid but gives a result as large."""
    return 10**6 if name == "k" and value == 2**31 - 1 else value


def spoil_array(rng, x):
    """The array with another type, shape or stride."""
    kind = rng.randrange(8)
    if kind == 0:
        return x.astype(rng.choice(TYPES))
    if kind == 1:
        return x[None] if rng.random() < 0.5 else x.reshape(-1)
    if kind == 2 and x.ndim:
        return x[..., : rng.choice([0, 1, max(x.shape[-1] - 1, 0)])]
    if kind == 3 and x.ndim:
        return x[: rng.choice([0, 1, 2])]
    if kind == 4 and x.ndim > 1:
        return x.swapaxes(0, -1)
    if kind == 5 and x.ndim:
        return mx.broadcast_to(x[:1], (rng.choice([1, 2, 7]), *x.shape[1:]))
    if kind == 6:
        shape = list(x.shape)
        if shape:
            shape[rng.randrange(len(shape))] = rng.choice(SIZES)
        return mx.broadcast_to(mx.array(1, x.dtype), shape)
    return mx.array(rng.choice([0, 1, 5]), x.dtype)


def strided(rng, x):
    """The same numbers with other strides."""
    if not isinstance(x, mx.array) or x.ndim == 0 or rng.random() < 0.8:
        return x
    if x.ndim > 1 and rng.random() < 0.5:
        return mx.contiguous(x.swapaxes(0, -1)).swapaxes(0, -1)
    return mx.repeat(x, 2, axis=-1)[..., ::2]


def outcome(call, arguments, **path):
    """The bits of the result, with NaNs made equal, or the error's message."""
    try:
        result = call(**arguments, **path)
        results = result if isinstance(result, tuple) else (result,)
        mx.eval(*results)
    except Exception as error:
        if clear_error(error) is None:
            raise
        return error
    wide = [np.array(r if r.dtype in TYPES[3:] else r.astype(mx.float32)) for r in results]
    return [(w.shape, np.where(w != w, 7, w).tolist()) for w in wide]


def case(seed, folder):
    """Make one call on both paths."""
    rng = random.Random(seed)
    call, arguments = rng.choice(CALLS)(rng)
    arguments = {name: strided(rng, value) for name, value in arguments.items()}
    for name in rng.sample(list(arguments), rng.choice([0, 0, 1, 1, min(2, len(arguments))])):
        arguments[name] = affordable(name, spoil(rng, arguments[name]))
    one_path = call in (ops.swiglu, ops.expert_sum)
    found = [
        outcome(call, arguments, **({} if one_path else {"reference": r})) for r in (False, True)
    ]
    errors = [f for f in found if isinstance(f, Exception)]
    if len(errors) == 1:
        raise Wrong(f"{describe(call, arguments)}: one path alone refuses: {errors[0]}")
    if errors:
        return f"error: {errors[0]}"
    if found[0] != found[1]:
        raise Wrong(f"{describe(call, arguments)}: the paths differ")
    return "right"


def describe(call, arguments):
    """The call, with shapes in the place of arrays."""

    def short(value):
        if isinstance(value, mx.array):
            return f"{value.dtype} {list(value.shape)}"
        return f"{type(value).__name__}" if isinstance(value, ops.Weight) else f"{value!r:.40}"

    inner = ", ".join(f"{name}={short(value)}" for name, value in arguments.items())
    return f"{getattr(call, '__name__', 'model')}({inner})"


@contextmanager
def planted():
    """The fused matrix product is off by one in a thousand."""
    right = ops.quantized_matvec

    def wrong(x, w, reference=None):
        y = right(x, w, reference=reference)
        return y if reference else y * 1.001 + 0.01

    with mock.patch.object(ops, "quantized_matvec", wrong):
        yield
