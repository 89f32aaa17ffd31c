"""Every barrier, bound and mask of the router's shader is needed, as test_metal_mutations says."""

import functools

import mlx.core as mx
import numpy as np
import pytest
import sim
from metal_kernels import host_name
from metal_mutants import Mutants, Mutation

from glm_fused import ops

# Name, inputs, change: its text, with @old@new@ where it differs. Last: the n-th such text.
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
ROUTER = [
    *((f"barrier {i}", "grouped", BARRIER, i) for i in range(6)),
    ("experts of a tile", "grouped", "used = experts - e@@ + 1@;"),
    ("experts of a tile, one less", "grouped", "used = experts - e@@ - 1@;"),
    ("experts of the logits, one less", "grouped", "e < experts@@ - 3@; e += simdgroups"),
    ("logits", "grouped", "r < rows@@ - 1@; r++"),
    ("one lane", "grouped", "if (@lane == 0 && @@r < used"),
    ("experts mask", "grouped", "lane == 0@ && r < used@@"),
    ("lane of a row", "grouped", "x@ + lane * F::values@@, offsets", 1),
    ("token", "grouped", "x@ + tid.x * params.hidden@@,"),
    ("rank", "grouped", "j < end@@ + 1@; j++"),
    ("rank, one less", "grouped", "j < end@@ - 1@; j++"),
    ("rank from the first", "grouped", "j = begin@@ + 1@; j <"),
    ("tie", "ties", "x == y && i <@@=@ j"),
    ("tie by index", "ties", "i @<@>@ j"),
    ("equal precedes", "ties", "x >@@=@ y ||"),
    ("NaN of the other", "nan", "@isnan(a) ? -INFINITY : a@a@"),
    ("NaN of its own", "nan", "@isnan(b) ? -INFINITY : b@b@"),
    *((f"experts {i}", "grouped", "e < experts@@ + 1@; e += threads", i) for i in range(4)),
    *(
        (f"experts {i}, one less", case, "e < experts@@ - 1@; e += threads", i)
        for i, case in enumerate(("last", "alone", "last", "last"))
    ),
    ("group of an expert", "grouped", "(group@ + 1@@) * size"),
    ("best two", "grouped", "rank < @2@3@"),
    ("best two, one less", "grouped", "rank < @2@1@"),
    ("groups", "grouped", "g < groups@@ + 1@; g +="),
    ("groups, one less", "grouped", "g < groups@@ - 1@; g +="),
    ("groups ranked", "grouped", "rank_of(worth, 0, groups@@ + 1@,"),
    ("groups ranked, one less", "grouped", "rank_of(worth, 0, groups@@ - 1@,"),
    ("kept groups", "grouped", ">@=@@ kept"),
    ("kept groups, one less", "grouped", ">= kept@@ - 1@"),
    ("chosen", "grouped", "rank < top_k@@ + 1@"),
    ("chosen, one less", "grouped", "rank < top_k@@ - 1@"),
    ("experts ranked, one less", "last", "rank_of(scores, 0, experts@@ - 1@,"),
    ("total", "grouped", "i < top_k@@ + 1@; i++"),
    ("total, one less", "grouped", "i < top_k@@ - 1@; i++"),
    ("shares", "grouped", "j < top_k@@ + 1@; j +="),
    ("shares, one less", "grouped", "j < top_k@@ - 1@; j +="),
]
# No run can show it: the step past the last expert has no rows.
EQUIVALENT = Mutation("experts", "grouped", "router", "e < experts@@ + 1@; e += simdgroups")
UNCHANGED = Mutation("none", "ties", "router", "e < experts@@@; e += simdgroups")
MUTATIONS = [Mutation(name, case, "router", *change) for name, case, *change in ROUTER]
router = Mutants(
    "router_topk",
    [*MUTATIONS, EQUIVALENT, UNCHANGED],
    lambda _: "router_topk<float, float, 15, 3>",
)


@functools.cache
def inputs(case):
    rng = np.random.default_rng(1)
    draw = (lambda s: rng.integers(-1, 2, s)) if case == "ties" else rng.standard_normal
    x, weight, bias = (draw(s).astype(np.float32) for s in ((2, 9), (15, 9), (15,)))
    if case == "nan":
        bias[np.arange(15) % 5 != 2] = np.nan  # fewer numbers than experts chosen
    if case == "last":
        bias[14] += 5  # is chosen
    if case == "alone":
        bias[10:15] += np.float32([-9, -9, -9, -9, 2])  # the best one is in the worst group
    return x, weight, bias


def caught(mutation):
    """Whether the tracer or the result tells the changed shader from a right one."""
    lib, function = router.find(mutation)
    x, weight, bias = inputs(mutation.case)
    top_k = 4
    chosen, shares = np.full((2, top_k), -1, np.int32), np.full((2, top_k), np.nan, np.float32)
    head = np.array([x.shape[1], top_k, 2, 1], np.int32).tobytes() + np.float32(2.5).tobytes()
    arrays = [x, weight, bias, chosen, shares, np.frombuffer(head, np.uint8).copy()]
    try:
        report = lib.run(
            host_name(function),
            grid=(2, 1, 1),
            threadgroup=(32, 2, 1),
            buffers=dict(enumerate(arrays)),
        )
    except sim.LaunchError:
        return True
    with mx.stream(mx.cpu):
        expected = ops.router_topk(
            *map(mx.array, (x, weight, bias)),
            top_k=top_k, n_group=3, topk_group=2, routed_scaling_factor=2.5,
        )  # fmt: skip
    same = np.array_equal(chosen, np.array(expected[0])) and np.array_equal(
        shares.view(np.uint32), np.array(expected[1]).view(np.uint32)
    )
    return not report.clean or not same


@pytest.mark.parametrize("same", [UNCHANGED, EQUIVALENT], ids=str)
def test_the_shader_itself_is_clean(same):
    assert not caught(same)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation):
    assert caught(mutation)
