"""Every barrier, bound and mask of the router's shader is needed, as test_metal_mutations says."""

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from metal_backend import cpu
from metal_mutants import Mutants, Mutation

from glm_fused import ops


@dataclass(frozen=True)
class Routing:
    """A case of 15 experts in 3 groups, with inputs of a kind."""

    kind: str
    tiles = (4, 2, 8, 2)

    @functools.cache  # noqa: B019
    def inputs(self):
        rng = np.random.default_rng(1)
        draw = (lambda s: rng.integers(-1, 2, s)) if self.kind == "ties" else rng.standard_normal
        x, weight, bias = (draw(s).astype(np.float32) for s in ((2, 9), (15, 9), (15,)))
        if self.kind == "nan":
            bias[np.arange(15) % 5 != 2] = np.nan  # fewer numbers are left than experts are chosen
        if self.kind == "last":
            bias[14] += 5  # so that the last expert is chosen
        if self.kind == "alone":
            bias[10:15] += np.float32([-9, -9, -9, -9, 2])  # the best one is in the worst group
        return [mx.array(a) for a in (x, weight, bias)]

    def run(self):
        return ops.router_topk(
            *self.inputs(), top_k=4, n_group=3, topk_group=2, routed_scaling_factor=2.5
        )


# Each has a name, a kind of inputs and a change, whose text has @old@new@ where it differs. Where
# the text occurs several times, a number follows that tells which.
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
# No run can show it, because the step past the last expert has no rows.
EQUIVALENT = Mutation(
    "experts", Routing("grouped"), "router_topk", "e < experts@@ + 1@; e += simdgroups"
)
MUTATIONS = [
    Mutation(name, Routing(kind), "router_topk", *change) for name, kind, *change in ROUTER
]
router = Mutants([*MUTATIONS, EQUIVALENT])


@pytest.mark.parametrize("kind", sorted({m.case.kind for m in MUTATIONS}))
def test_the_shader_itself_is_clean(kind):
    (launch,) = router.right(Routing(kind)).launches
    assert launch.report.clean, launch.report
    with cpu():
        chosen, shares = Routing(kind).run()
    assert launch.outputs == {3: bytes(memoryview(chosen)), 4: bytes(memoryview(shares))}


@pytest.mark.parametrize("changed", MUTATIONS, ids=str)
def test_mutation_is_caught(changed):
    assert router.caught_by(changed)


def test_equivalent_change_gives_the_same():
    assert not router.caught_by(EQUIVALENT)
