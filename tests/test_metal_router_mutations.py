"""Every barrier, bound and mask of the router's shaders is needed, as test_metal_mutations says."""

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
    """A named case of 15 experts in 3 groups; the name tells what its inputs are."""

    name: str
    tokens: int = 2
    hidden: int = 9
    tiles = (4, 2, 8, 2)

    @functools.cache  # noqa: B019
    def inputs(self):
        rng = np.random.default_rng(1)
        draw = (lambda s: rng.integers(-1, 2, s)) if self.name == "ties" else rng.standard_normal
        shapes = ((self.tokens, self.hidden), (15, self.hidden), (15,))
        x, weight, bias = (draw(s).astype(np.float32) for s in shapes)
        if self.name == "nan":
            bias[np.arange(15) % 5 != 2] = np.nan  # fewer numbers are left than experts are chosen
        if self.name == "infinite":
            bias[:5] = np.float32([np.inf, *[-np.inf] * 4])  # the first group's worth is a NaN
        if self.name == "last":
            bias[14] += 5  # so that the last expert is chosen
        if self.name == "alone":
            bias[10:15] += np.float32([-9, -9, -9, -9, 2])  # the best one is in the worst group
        return [mx.array(a) for a in (x, weight, bias)]

    def run(self):
        return ops.router_topk(
            *self.inputs(), top_k=4, n_group=3, topk_group=2, routed_scaling_factor=2.5
        )


GROUPED, TIES, NAN, INFINITE, LAST, ALONE = map(
    Routing, ("grouped", "ties", "nan", "infinite", "last", "alone")
)
# The second eight tokens are one.
WIDE = Routing("wide", tokens=9, hidden=137)
# A row is the eight blocks that a lane asks for at once, one block more and some columns.
LONG = Routing("long", tokens=1, hidden=1161)
# Rows begin at multiples of four values.
FOURS = Routing("fours", tokens=1, hidden=1164)
# A row is eight blocks.
EIGHT = Routing("eight", tokens=1, hidden=1024)
CASES = [GROUPED, TIES, NAN, INFINITE, LAST, ALONE, WIDE, LONG, FOURS, EIGHT]

# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
LOGITS = [
    ("rows", WIDE, "row >= experts@@ + 1@"),
    ("rows, one less", WIDE, "row >= experts@@ - 1@"),
    ("row of a threadgroup", WIDE, "tid.x@ * simdgroups@@ + simd_gid"),
    ("row of a simdgroup", WIDE, "tid.x * simdgroups@ + simd_gid@@"),
    ("row of the weight", WIDE, ".at(@row@0@, 1, hidden"),
    ("lane of the weight", WIDE, ".at(row, 1, hidden, @simd_lid@0@)"),
    ("tokens of a block", WIDE, "used = @min(width, params.tokens - int(token))@width@;"),
    ("tokens of a block, one more", WIDE, "params.tokens - int(token)@@ + 1@)"),
    ("tokens of a block, one less", WIDE, "params.tokens - int(token)@@ - 1@)"),
    ("first token of a block", WIDE, "token = size_t(tid.y)@ * width@@;"),
    ("token of a vector", WIDE, "offsets[m] = @min(m, used - 1)@0@ * hidden"),
    ("tokens past the last", WIDE, "offsets[m] = @min(m, used - 1)@m@ * hidden"),
    ("offsets", WIDE, "m < width@@ + 1@; m++) {\n    offsets"),
    ("offsets, one less", WIDE, "m < width@@ - 1@; m++) {\n    offsets"),
    ("tokens of x", WIDE, "{x@ + token * hidden@@, offsets"),
    ("lane of x", WIDE, "load<F>(m, at@ + own@@,"),
    ("results, one less", WIDE, "m < width@@ - 1@; m++) {\n    if"),
    ("one lane", WIDE, "if (@simd_lid == 0 && @@m < used) {"),
    ("tokens stored", WIDE, "simd_lid == 0 && m < used@@ + 1@) {"),
    ("tokens stored, one less", WIDE, "simd_lid == 0 && m < used@@ - 1@) {"),
    ("tokens stored mask", WIDE, "simd_lid == 0@ && m < used@@) {"),
    ("token of a logit", WIDE, "logits[(@token + @@m) * experts"),
    ("row of a logit", WIDE, "* experts@ + row@@]"),
    # dot_rows.h, several blocks at once
    ("rounds", LONG, "column@ + depth * F::block <= end@ < end@; column +="),
    ("step of a round", LONG, "column += @depth * @@F::block) {"),
    ("blocks left", LONG, "if constexpr (depth > @1@8@) {"),
    ("blocks read", LONG, "i < depth * all@@ + 1@; i++"),
    ("blocks read, one less", LONG, "i < depth * all@@ - 1@; i++"),
    ("blocks read mask", LONG, "if ((@whole || at < end@true@) && (F"),
    ("blocks read mask, one more", LONG, "if ((whole || at < end@@ + 1@) && (F"),
    ("blocks read mask, one less", LONG, "if ((whole || at < end@@ - F::block@) && (F"),
    ("column of a weight", LONG, "at = column@ + i / all * F::block@@;"),
    ("blocks multiplied", LONG, "d < depth@@ + 1@; d++"),
    ("blocks multiplied, one less", LONG, "d < depth@@ - 1@; d++"),
    ("blocks multiplied mask", LONG, "m < width && (@whole || at < end@true@);"),
    ("blocks multiplied mask, one more", LONG, "m < width && (whole || at < end@@ + 1@);"),
    ("blocks multiplied mask, one less", LONG, "(whole || at < end@@ - F::block@); m++"),
    ("column of a value", LONG, "at = column@ + d * F::block@@;"),
    ("weights of a block", LONG, "cells[@d * all + @@i], x_thread"),
    # formats/dense.h
    ("four values", FOURS, "vec<From, values>*)@from@(from + values)@;"),
    ("values of four", FOURS, "i < values@@ + 1@; i++) {\n        to[i]", 0),
    ("values of four, one less", FOURS, "i < values@@ - 1@; i++) {\n        to[i]", 0),
    ("values", LONG, "i < values@@ + 1@; i++) {\n        to[i]", 1),
    ("values, one less", LONG, "i < values@@ - 1@; i++) {\n        to[i]", 1),
]
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
SELECT = [
    *((f"barrier {i}", GROUPED, BARRIER, i) for i in range(5)),
    ("logits of a token", GROUPED, "logits[@size_t(tid.x) * experts + @@e]"),
    ("rank", GROUPED, "j < end@@ + 1@; j++"),
    ("rank, one less", GROUPED, "j < end@@ - 1@; j++"),
    ("rank from the first", GROUPED, "j = begin@@ + 1@; j <"),
    ("tie", TIES, "scores[j] == score && j <@@=@ i"),
    ("tie by index", TIES, "j @<@>@ i"),
    ("equal comes before", TIES, "scores[j] >@@=@ score ||"),
    ("NaN", NAN, "@isnan(score) ? -INFINITY : score@score@"),
    ("NaN of a score", NAN, "scores[e] = @nan_as_least(weights[e] + correction_bias[e])"
        "@weights[e] + correction_bias[e]@;"),
    ("NaN of a group", INFINITE, "worth[g] = @nan_as_least@@(top"),
    *((f"experts {i}", GROUPED, "e < experts@@ + 1@; e +=", i) for i in range(4)),
    *(
        (f"experts {i}, one less", case, "e < experts@@ - 1@; e +=", i)
        for i, case in enumerate((LAST, ALONE, LAST, LAST))
    ),
    ("group of an expert", GROUPED, "(group@ + 1@@) * size"),
    ("best two", GROUPED, "rank < @2@3@"),
    ("best two, one less", GROUPED, "rank < @2@1@"),
    ("groups", GROUPED, "g < groups@@ + 1@; g +="),
    ("groups, one less", GROUPED, "g < groups@@ - 1@; g +="),
    ("groups ranked", GROUPED, "rank_of(worth, 0, groups@@ + 1@,"),
    ("groups ranked, one less", GROUPED, "rank_of(worth, 0, groups@@ - 1@,"),
    ("kept groups", GROUPED, ">@=@@ kept"),
    ("kept groups, one less", GROUPED, ">= kept@@ - 1@"),
    ("chosen", GROUPED, "rank < top_k@@ + 1@"),
    ("chosen, one less", GROUPED, "rank < top_k@@ - 1@"),
    ("chosen of a token", GROUPED, "chosen[@tid.x * top_k + @@rank]"),
    ("experts ranked, one less", LAST, "rank_of(scores, 0, experts@@ - 1@,"),
    ("total", GROUPED, "i < top_k@@ + 1@; i++"),
    ("total, one less", GROUPED, "i < top_k@@ - 1@; i++"),
    ("shares", GROUPED, "j < top_k@@ + 1@; j +="),
    ("shares, one less", GROUPED, "j < top_k@@ - 1@; j +="),
    ("shares of a token", GROUPED, "shares[@tid.x * top_k + @@j]"),
]  # fmt: skip
# No run can show these, because the changed shader is as right; the reason is told.
EQUIVALENT = [
    # What is left after the whole rounds may be a whole one.
    ("router_logits", "rounds, one less", EIGHT, "depth * F::block <@=@@ end; column +="),
]

MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (("router_logits", LOGITS), ("router_select", SELECT))
    for name, case, *change in table
]
SAME = [Mutation(name, case, kernel, *change) for kernel, name, case, *change in EQUIVALENT]
router = Mutants(MUTATIONS, SAME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = router.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with cpu():
        chosen, shares = case.run()
    assert launches[1].outputs == {2: bytes(memoryview(chosen)), 3: bytes(memoryview(shares))}


@pytest.mark.parametrize("mutation", router.params(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation):
    assert router.caught_by(mutation)


@pytest.mark.parametrize("mutation", router.params(SAME), ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not router.caught_by(mutation)
