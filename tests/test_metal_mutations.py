"""Every barrier, bound and mask of the shaders is needed: without it the tracer or the result
says so."""

import mlx.core as mx
import numpy as np
import pytest
import sim
from metal_kernels import (
    Case,
    fused_functions,
    host_name,
    instance,
    make_layer,
    run_cpu,
    run_fused,
    shader,
)

from glm_fused import ops

DENSE, AFFINE4 = ("dense", 0, 0), ("affine", 4, 32)
SHARED = Case("float32", AFFINE4, AFFINE4, DENSE, 3, 2, 288, 45, 2, simdgroups=(2, 2))
ODD = Case("float32", DENSE, DENSE, AFFINE4, 2, 2, 77, 64, 2, simdgroups=(2, 2))
FAST = Case("float32", AFFINE4, AFFINE4, DENSE, 1, 1, 512, 8, 1, simdgroups=(3, 2))
BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"

# what it is: the case it shows in, its text, the text put in place, which occurrence
MUTATIONS = {
    "barrier after links": (SHARED, BARRIER, "", 0),
    "barrier after terms": (SHARED, BARRIER, "", 1),
    "links bound": (SHARED, "p < pairs; p += threads", "p <= pairs; p += threads", 0),
    "pairs bound": (SHARED, "pair < pairs; pair +=", "pair <= pairs; pair +=", 0),
    "earlier pairs bound": (SHARED, "q < pair; q++", "q <= pair; q++", 0),
    "later pairs bound": (SHARED, "q > pair; q--", "q >= pair; q--", 0),
    "first pair scanned": (SHARED, "int q = pairs - 1;", "int q = pairs;", 0),
    "next member bound": (SHARED, "next < pairs;", "next <= pairs;", 0),
    "leader mask": (SHARED, "group.count = links[pair] % 2;", "group.count = 1;", 0),
    "gate rows mask": (SHARED, "i / width < used && ", "", 0),
    "gate lane mask": (SHARED, "lane == 0 && ", "", 0),
    "down lane mask": (SHARED, "lane == 0 && ", "", 1),
    "rows read": (SHARED, "F::whole_tiles || i % rows < used", "true", 0),
    "tail rows read": (
        SHARED,
        "      if (i % rows < used) {\n        thread",
        "      {\n        thread",
        0,
    ),
    "last row of the tile": (
        ODD,
        "used = min(step, hidden - row)",
        "used = min(step, hidden - row + 1)",
        0,
    ),
    "last gate row": (
        SHARED,
        "min(step, intermediate - row)",
        "min(step, intermediate - row + 1)",
        0,
    ),
    "no rows left": (FAST, "if (used <= 0) {", "if (used < 0) {", 0),
    "tail lanes": (SHARED, "left > 0; i++", "left >= 0; i++", 0),
    "tail values": (
        ODD,
        "clamp(k - end - lane * F::values, 0,",
        "clamp(k - end - lane * F::values + 1, 0,",
        0,
    ),
    "dense weight mask": (ODD, "i < used ? from[i] : W(0)", "from[i]", 0),
    "dense x mask": (
        ODD,
        "i < used ? static_cast<float>(x[i]) : 0.0f",
        "static_cast<float>(x[i])",
        0,
    ),
    "block count": (FAST, "fast ? k / block : (k - 1) / block", "k / block + 1", 0),
    "tokens bound": (SHARED, "i < params.tokens * used;", "i <= params.tokens * used;", 0),
    "choices bound": (SHARED, "choice < params.top_k;", "choice <= params.top_k;", 0),
    "rows summed": (ODD, "min(rows, params.hidden - row)", "rows", 0),
}


def mutate(text, old, new, occurrence):
    parts = text.split(old)
    assert len(parts) > occurrence + 1, f"{old!r} is not in the shader"
    head, tail = old.join(parts[: occurrence + 1]), old.join(parts[occurrence + 1 :])
    return head + new + tail


def caught(case, text):
    """Whether the tracer or the result tells `text` from a right shader."""
    lines = "".join(instance(f) for f in fused_functions(case))
    lib = sim.compile(text + lines, contract=True, trace=True)
    layer = make_layer(case, pad=False)
    if case is SHARED:
        layer.slots[:] = np.array([1, 0])
    try:
        y = run_fused(lib, layer)
    except sim.LaunchError:
        return True
    clean = all(report.clean for report in layer.reports)
    return not clean or not np.array_equal(y, run_cpu(layer))


@pytest.mark.parametrize("case", [SHARED, ODD, FAST], ids=["shared", "odd", "fast"])
def test_the_shader_itself_is_clean(case):
    assert not caught(case, shader("moe_decode"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_moe_decode_mutation_is_caught(name):
    case, old, new, occurrence = MUTATIONS[name]
    assert caught(case, mutate(shader("moe_decode"), old, new, occurrence))


def router_caught(text):
    function = "router_topk<float, float, 15, 3>"
    lib = sim.compile(text + instance(function), contract=True, trace=True)
    rng = np.random.default_rng(1)
    hidden, top_k = 9, 4
    x, weight, bias = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, hidden), (15, hidden), (15,))
    )
    chosen, shares = np.full((2, top_k), -1, np.int32), np.full((2, top_k), np.nan, np.float32)
    head = np.array([hidden, top_k, 2, 1], np.int32).tobytes() + np.float32(2.5).tobytes()
    report = lib.run(
        host_name(function),
        grid=(2, 1, 1),
        threadgroup=(32, 2, 1),
        buffers={
            0: x, 1: weight, 2: bias, 3: chosen, 4: shares, 5: np.frombuffer(head, np.uint8).copy()
        },
    )  # fmt: skip
    with mx.stream(mx.cpu):
        expected = ops.router_topk(
            mx.array(x), mx.array(weight), mx.array(bias),
            top_k=top_k, n_group=3, topk_group=2, routed_scaling_factor=2.5,
        )  # fmt: skip
    same = np.array_equal(chosen, np.array(expected[0])) and np.array_equal(
        shares.view(np.uint32), np.array(expected[1]).view(np.uint32)
    )
    return not report.clean or not same


ROUTER = {
    **{f"barrier {i}": (BARRIER, "", i) for i in range(6)},
    "chosen bound": ("rank < top_k", "rank <= top_k", 0),
    "top two": ("rank < 2", "rank < 3", 0),
    "kept groups": (">= kept", "> kept", 0),
    "tie": ("x == y && i < j", "x == y && i <= j", 0),
    "experts mask": ("lane == 0 && r < used", "lane == 0", 0),
    "rank bound": ("j < end; j++", "j <= end; j++", 0),
    "total bound": ("i < top_k; i++", "i <= top_k; i++", 0),
    "shares bound": ("j < top_k; j +=", "j <= top_k; j +=", 0),
    "groups bound": ("g < groups; g +=", "g <= groups; g +=", 0),
}


def test_the_router_itself_is_clean():
    assert not router_caught(shader("router_topk"))


@pytest.mark.parametrize("name", ROUTER)
def test_router_mutation_is_caught(name):
    assert router_caught(mutate(shader("router_topk"), *ROUTER[name]))
