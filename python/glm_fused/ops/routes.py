"""Which code runs an op, and why: the ops, ``GLM_FUSED_DEBUG``, the self-test and reports read it.

=================  ===============  =====================  ===============  ======================
op                 fused, CPU       fused, GPU             reference, CPU   reference, GPU
=================  ===============  =====================  ===============  ======================
quantized_matvec   ``cpu``          ``mlx``, whose bits    ``loops``        ``mlx``
                                    the CPU's follow
expert_matvec      ``cpu``          ``mlx``                ``loops``        ``mlx``
moe_decode         ``cpu``          ``metal``;             ``loops``        ``mlx``: ``gather_qmm``,
                                    ``metal_prompt``                        `swiglu`, `expert_sum`
router_topk        ``cpu``          ``metal``              ``loops``        ``loops``, on the CPU
rms_norm           ``cpu``          ``metal``              ``loops``        ``loops``, on the CPU
layer_norm         ``cpu``          ``metal``              ``loops``        ``loops``, on the CPU
rotate             ``cpu``          ``metal``              ``loops``        ``loops``, on the CPU
append_rows        ``cpu``          ``metal``              ``mlx``          ``mlx``
indexer_topk       ``cpu``          ``metal``;             ``loops``        ``loops``, on the CPU
                                    ``metal_prompt``
sparse_mla_decode  ``cpu``          ``metal``;             ``loops``        ``loops``, on the CPU
                                    ``metal_prompt``
=================  ===============  =====================  ===============  ======================

``cpu`` and ``metal`` are this package's kernels, ``loops`` its plain loops with one rounding a
step, which define the bits, and ``mlx`` is a chain of stock MLX ops (`glm_fused.ops.stock`). The
paths of a device have the same bits, but for the norms, `indexer_topk` and `sparse_mla_decode` as
``mlx``, which is where a GPU without Metal falls back to, and but for ``metal_prompt``: this
package's Metal kernels for more than 16 tokens, which multiply on matrix units. The order of their
sums is the hardware's: they give the same bits each time, with an error against float64 that is no
larger than that of ``metal``. What a Metal kernel does not take falls
back, too: the route says so, and the op warns once. MLX has no ops for FP8 weights: the reference
is ``loops`` for them.
For up to 16 tokens the ops of a layer are joined in blocks (`glm_fused.ops.blocks`), which have
their bits, and on Metal this package's kernels for matrices, too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import _ext
from ..environment import debug
from . import metal_sim, paths

Kernel = _ext.Kernel
Stream = mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None


@dataclass(frozen=True, slots=True)
class Route:
    """The code that runs an op.

    Attributes:
        op: the op's name.
        kernel: which code, as the table above has it.
        reason: why it is not the fused kernel of the device; empty where it is.
        fell_back: whether that is for want of a kernel, rather than asked for or better.
    """

    op: str
    kernel: _ext.Kernel
    reason: str = ""
    fell_back: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.kernel.name}" + (f" ({self.reason})" if self.reason else "")


_MATRICES = ("quantized_matvec", "expert_matvec")  # on a GPU those of MLX, but in blocks

_CPU, _METAL = (
    {
        op: Route(op, kernel)
        for op in (
            "quantized_matvec",
            "expert_matvec",
            "moe_decode",
            "router_topk",
            "rms_norm",
            "layer_norm",
            "rotate",
            "append_rows",
            "indexer_topk",
            "sparse_mla_decode",
        )
    }
    for kernel in (Kernel.cpu, Kernel.metal)
)


def choose(
    op: str,
    *sizes: int,
    stream: Stream = None,
    reference: bool | None = None,
    stock_ops: bool = True,
    prompt: bool | None = None,
) -> Route:
    """The code that runs ``op``.

    Args:
        op: one of the table above.
        sizes: what a Metal kernel may not take: of moe_decode tokens and top_k, of router_topk
            experts, of sparse_mla_decode the keys listed for a query.
        stream: where; None: the default device. In a build with the simulator, within
            `metal_sim.simulated`, ops with a Metal kernel run it wherever they are asked to run.
        reference: True or False overrides the current path.
        stock_ops: whether MLX has matrix kernels for the weights' formats.
        prompt: whether the tokens are a prompt's, for moe_decode, indexer_topk and
            sparse_mla_decode; None: if they are moe_decode's and more than 16.
    """
    on_gpu = is_gpu(stream)
    if paths.use_reference(reference):
        stock = on_gpu and stock_ops and op in (*_MATRICES, "moe_decode")
        stock = stock or op == "append_rows"
        return Route(op, Kernel.mlx if stock else Kernel.loops, "the reference, asked for")
    if not (on_gpu or metal_sim.active()):
        return _CPU[op]
    if op in _MATRICES:
        return Route(op, Kernel.mlx) if on_gpu else _CPU[op]
    other = Kernel.mlx if on_gpu and op != "router_topk" else Kernel.cpu
    if not has_metal(stream):
        return Route(op, other, "MLX finds no Metal device", True)
    many = op == "moe_decode" and sizes[0] > _ext.metal_max_tokens
    if many if prompt is None else prompt:
        return Route(op, Kernel.metal_prompt)
    if many:
        return Route(op, other, f"{sizes[0]} tokens that are no prompt")
    if obstacle := metal_obstacle(op, *sizes):
        return Route(op, other, obstacle, True)
    return _METAL[op]


def metal_obstacle(op: str, *sizes: int) -> str:
    """Why the op's Metal kernel does not take these sizes (see `choose`); empty if it does."""
    if op == "moe_decode":
        return _ext.moe_decode_obstacle(*sizes)
    if op == "router_topk":
        return _ext.router_topk_obstacle(*sizes)
    return _ext.sparse_mla_decode_obstacle(*sizes) if op == "sparse_mla_decode" else ""


def take(op: str, *sizes: int, stream: Stream, reference: bool | None, **how: Any) -> _ext.Kernel:
    """`choose`, for an op that is about to run: a fall-back is warned of once."""
    route = choose(op, *sizes, stream=stream, reference=reference, **how)
    if route.fell_back:
        paths.fall_back(route.op, route.reason)
    elif route.reason and not paths.use_reference(reference):
        debug("%s", route)
    return route.kernel


def on(stream: Stream) -> contextlib.AbstractContextManager[Any]:
    """Within the block, MLX's ops run on ``stream``; None leaves them where they are."""
    return contextlib.nullcontext() if stream is None else mx.stream(stream)


def is_gpu(stream: Stream) -> bool:
    """Whether a stream is a GPU's; None is the default device's. Raises TypeError for others."""
    if stream is None:
        return bool(mx.default_device() == mx.gpu)
    if not isinstance(stream, Stream):
        raise TypeError(f"[ops] stream must be an MLX stream or device but is {stream!r}.")
    return bool(getattr(stream, "device", stream) == mx.gpu)


def has_metal(stream: Stream) -> bool:
    """Whether ops with a Metal kernel of their own have a device to run it on."""
    return metal_sim.active() or (is_gpu(stream) and mx.metal.is_available())
