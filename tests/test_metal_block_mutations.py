"""Every bound, stride and rounding that the blocks' shaders add to those of the ops is needed."""

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES
from metal_backend import cpu
from metal_mutants import Mutants, Mutation
from test_blocks import Layer

from glm_fused.ops import blocks

AFFINE4, DENSE = ("affine", 4, 32), ("dense", 0, 0)
ROUTING = dict(top_k=2, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
EPS = 0.1  # so large that results show it


@dataclass(frozen=True)
class Half:
    """A block's arrays, all of them small and odd; `make` gives its function and arguments."""

    name: str
    make: object
    dtype: str = "bfloat16"
    tiles: tuple[int, int, int, int] = (2, 2, 2, 2)

    @functools.cache  # noqa: B019
    def call(self):
        layer = Layer(3, DENSE, DTYPES[self.dtype])
        function, *arguments = self.make(layer)
        mx.eval(arguments)
        return function, arguments

    def run(self):
        function, arguments = self.call()
        found = function(*arguments)
        return found if isinstance(found, tuple) else (found,)


def mlp(layer, tokens=3, hidden=141, intermediate=5):
    """Products with a block of columns, and lanes that are not whole after it."""
    x, norm = layer.array(1, tokens, hidden), layer.norm(hidden, EPS)
    return blocks.mlp_block, x, norm, layer.mlp(hidden, intermediate)


def experts(layer, shared=True):
    x, norm, router = layer.array(1, 3, 150), layer.norm(150, EPS), layer.array(5, 150)
    bias = mx.array(layer.rng.standard_normal(5, dtype=np.float32))
    weights = layer.mlp(150, 6, 5), layer.mlp(150, 9) if shared else None
    block = functools.partial(blocks.moe_block, **ROUTING)
    return block, x, norm, (router, bias), *weights


def attention(layer, b=2, interleaved=True):
    """Products with a block of columns and a rest."""
    length, hidden, q_rank, heads, nope, rope, rank = 3, 288, 64, 3, 32, 6, 35
    angles = layer.rng.uniform(0, 6, (2, b, 1, length, rope // 2)).astype(np.float32)
    layer.fmt = AFFINE4
    given = [
        layer.array(b, length, hidden), mx.array(np.cos(angles[0])), mx.array(np.sin(angles[1])),
        layer.norm(hidden, EPS), layer.weight(q_rank, hidden), layer.norm(q_rank, EPS),
        layer.weight(heads * (nope + rope), q_rank), layer.weight(rank + rope, hidden),
        layer.norm(rank, EPS), layer.weight(heads, rank, nope), nope,
    ]  # fmt: skip
    wq_b, norm = layer.weight(2 * 45, q_rank), layer.norm(45, EPS)
    layer.fmt = DENSE
    indexer = blocks.IndexerArguments(
        layer.weight(45, hidden), norm, layer.array(45), wq_b, layer.weight(2, hidden), 2,
        interleaved, True,
    )  # fmt: skip
    return blocks.attention_project, *given, indexer


def output(layer):
    x, attended = layer.array(2, 2, 21), layer.array(2, 2, 3, 10).astype(mx.float32) * 1.001
    return blocks.attention_output, x, attended, layer.weight(3, 7, 10), layer.weight(21, 21)


def attend(layer, length=3, rank=133, values=7):
    """Queries with three splits, of which the last has no key."""
    q, total = layer.array(1, length, 3, rank + 4), 140
    latents, ropes = layer.array(1, total, rank), layer.array(1, total, 4)
    selected = layer.rng.integers(0, total, (1, length, 130))
    selected[:, :, 128:] = -1
    selected = mx.array(selected.astype(np.int32))
    block = functools.partial(blocks.attend, rank=rank, scale=0.1)
    weights = layer.weight(3, values, rank), layer.weight(21, 3 * values)
    return block, layer.array(1, length, 21), q, latents, ropes, selected, *weights


MLP, EXPERTS, OUTPUT = Half("mlp", mlp), Half("experts", experts), Half("output", output)
FULL, HALVES = (
    Half("full", attention),
    Half("halves", functools.partial(attention, b=1, interleaved=False)),
)
# More tokens than one read of a row serves.
LONG = Half("long", functools.partial(mlp, tokens=18, hidden=9))
ATTEND = Half("attend", attend)
# Its simdgroups take more than a row each.
TALL = Half("tall", functools.partial(attend, length=1, values=40), tiles=(1, 1, 1, 1))
# Only one token's vector fits into threadgroup memory.
VAST = Half("vast", functools.partial(attend, rank=9000))
ROUTED = Half("routed", functools.partial(experts, shared=False))
CASES = [MLP, EXPERTS, OUTPUT, FULL, HALVES, LONG, ROUTED, ATTEND, TALL, VAST]

BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
PROJECT = [
    # Activations
    ("vector", MLP, "x[@offsets[m] + @@column]"),
    ("column", MLP, "x[offsets[m]@ + column@@]"),
    ("inverse of a vector", MLP, "inverses[@m@0@],"),
    ("column of the norm", MLP, "static_cast<float>(weight[@column@0@])"),
    ("values", FULL, "i < F::values@@ - 1@; i++) {\n      values[i] = value(m, column + i)"),
    ("value of a lane", MLP, "values[i] = value(m, column@ + i@@)"),
    ("values of a tail", MLP, "i < F::values@@ - 1@; i++) {\n      values[i] = i"),
    ("value of a tail", MLP, "i < left ? value(m, column@ + i@@)"),
    ("columns past the last", MLP, "values[i] = @i < left ? value(m, column + i) : T(0)"
        "@value(m, column + i)@;"),
    ("columns past the last, one less", MLP, "values[i] = i < left@@ - 1@ ?"),
    # find_inverses
    ("inverses", FULL, "m < width@@ - 1@; m += simdgroups"),
    ("inverses of a simdgroup", FULL, "m += simdgroups@@ * 2@) {\n    const float squares"),
    ("simdgroups", FULL, "int m = @simdgroup@0@; m < width"),
    ("vector of the squares", FULL, "squares_of(x@ + offsets[m]@@, 1, k"),
    ("columns of the squares", FULL, "offsets[m], 1, k@@ - 1@, 0.0f"),
    ("count of the squares", FULL, "inverse_root(squares, k@@ + 1@, eps)"),
    ("epsilon", FULL, "inverse_root(squares, k, @eps@0.0f@)"),
    ("barrier after inverses", FULL, BARRIER, 0),
    # Product
    ("rows left", MLP, "used = params->rows - row@@ + 1@;", 0),
    ("rows left, one less", MLP, "used = params->rows - row@@ - 1@;", 1),
    ("rows left of a product", FULL, "used = params->rows - row@@ + 1@;", 0),
    ("rows left of a product, one less", FULL, "used = params->rows - row@@ - 1@;", 0),
    ("steps", FULL, "r < rows@@ + 1@; r += step", 0),
    ("steps, one less", FULL, "r@@ + step@ < rows; r += step", 0),
    ("steps of a pair", MLP, "r < rows@@ + 1@; r += step", 1),
    ("steps of a pair, one less", MLP, "r@@ + step@ < rows; r += step", 1),
    ("row of the weight", FULL, "from = w.skip(@row@0@, 0, k)"),
    ("row of gate", MLP, "gate.skip(@row@0@, 0, k)"),
    ("row of up", MLP, "up.skip(@row@0@, 0, k)"),
    ("results, one less", LONG, "i < step * width@@ - 1@; i++", 0),
    ("results of a pair, one less", LONG, "i < step * width@@ - 1@; i++", 1),
    ("one lane", FULL, "if (@tile.lane == 0 && @@i / width", 0),
    ("one lane of a pair", MLP, "if (@tile.lane == 0 && @@i / width", 1),
    ("rows stored", FULL, "tile.lane == 0 && @i / width < used && @@i % width", 0),
    ("rows stored of a pair", MLP, "tile.lane == 0 && @i / width < used && @@i % width", 1),
    ("tokens stored", FULL, "i / width < used@ && i % width < tile.count@@) {", 0),
    ("tokens stored, one less", FULL, "i % width < tile.count@@ - 1@) {", 0),
    ("tokens stored of a pair", MLP, "i / width < used@ && i % width < tile.count@@) {", 1),
    ("token of a result", FULL, "place(tile, @i % width@0@, row + i / width), result"),
    ("row of a result", FULL, "place(tile, i % width, row@ + i / width@@), result"),
    ("rounding of gate", MLP, "gated = @glm_fused::round_to(result[i], type)@result[i]@;"),
    ("results of up", MLP, "result[@step * width + @@i], type)"),
    ("rounding of up", MLP,
        "upped =\n              @glm_fused::round_to(result[step * width + i], type)"
        "@result[step * width + i]@;"),
    ("first token", LONG, "(@tile.token + @@m) * params->token_stride"),
    ("token's stride", FULL, "+ m) * params->@token@head@_stride"),
    ("head of a result", OUTPUT, "@tile.head * params->head_stride + @@row;"),
    ("row stored", FULL, "tile.head * params->head_stride@ + row@@;"),
    ("fp32", FULL, "if (@params->wide@false@) {"),
    ("rounding before the residual", OUTPUT, "rounded = @glm_fused::round_to(value, "
        "glm_fused::As<T>())@value@;"),
    ("residual", OUTPUT, "@adds ? static_cast<float>(residual[at]) + rounded : @@rounded"),
    ("place of the residual", OUTPUT, "residual[@at@0@]"),
    # the kernel
    ("block of tokens", LONG, "token = tid.y@ * width@@;"),
    ("tokens of a block", LONG, "used = @min(width, params.tokens - token)@width@;"),
    ("tokens past the last", LONG, "token + @min(m, used - 1)@m@) * params.token_stride"),
    ("token of a vector", FULL, "(@token + min(m, used - 1)@token@) * params.token_stride"),
    ("head of a vector", OUTPUT, "params.token_stride@ +\n        head * params.head_stride@@;"),
    ("norm's block", EXPERTS, "group == params.groups@@ + 1@"),
    ("norms of a simdgroup", EXPERTS, "m < used@@ - 1@; m += simdgroups"),
    ("norms of simdgroups", EXPERTS, "m < used; m += simdgroups@@ + 1@)"),
    ("token of a norm", EXPERTS, "normed_x + (token@ + m@@) * k"),
    ("columns of a norm", EXPERTS, "i < k@@ - 1@; i += kLanes) {\n          y[i] = vectors"),
    ("lanes of a norm", EXPERTS, "i < k; i += kLanes@@ + 1@) {\n          y[i] = vectors"),
    ("vector of a norm", EXPERTS, "vectors.value(@m@0@, i)"),
    ("matrices", FULL, "j < count@@ - 1@; j++"),
    ("first block of a matrix", FULL, "group >@=@@ params.products[j].first_group"),
    ("block of a matrix", FULL, "(group@ - own->first_group@@) * simdgroups"),
    ("rows of simdgroups", FULL, "* simdgroups@ + simd_gid@@) * rows"),
    ("output of the second", FULL, "product.y = @b_y@a_y@;"),
    ("output of the third", FULL, "product.y = @c_y@a_y@;"),
    ("output of the fourth", FULL, "product.y = @d_y@a_y@;"),
    ("head of a matrix", OUTPUT, "product.run(a.at(@head@0@, n"),
    ("lane of a matrix", FULL, "product.run(a.at(head, n, k, @lane@0@)"),
]  # fmt: skip
QUERIES = [
    # attention_rows.h
    ("token's cosines", FULL, "cosines@ + row_offset(params.cosines, token)@@,"),
    ("token's sines", FULL, "sines@ + row_offset(params.sines, token)@@,"),
    ("pairs", FULL, "params.cosines.columns@@ - 1@,"),
    ("value", FULL, "return static_cast<float>(x[@i@0@]);"),
    ("mean off a key", FULL, "static_cast<float>(x[i])@ - mean@@,"),
    ("inverse of a key", FULL, "mean,\n            @inverse@1.0f@,"),
    ("weight of a key", FULL, "static_cast<float>(weight[@i@0@]),\n            static"),
    ("bias of a key", FULL, "static_cast<float>(bias[@i@0@])"),
    ("rounding of a key", FULL, "const glm_fused::As<@T@float@> type;\n    return"),
    ("pairs rotated", FULL, "i < pairs@@ - 1@; i += kLanes"),
    ("first of a pair", FULL, "first = interleaved ? @2 * i@i@ : i;"),
    ("second of a pair", FULL, "second = interleaved ? 2 * i@ + 1@@ :"),
    ("first of halves", HALVES, "first = interleaved ? 2 * i : i@@ + 1@;"),
    ("second of halves", HALVES, "2 * i + 1 : @pairs + @@i;"),
    ("cosine", FULL, "angles.cosines[@i * angles.cosine_stride@0@]"),
    ("sine", FULL, "angles.sines[@i * angles.sine_stride@0@]"),
    ("columns that stay", FULL, "i < columns@@ - 1@; i += kLanes"),
    ("columns that stay, one more", FULL, "i < columns@@ + 1@; i += kLanes"),
    ("first column that stays", FULL, "int i = 2 * pairs@ + lane@@;"),
    ("queries of a token", FULL, "row <@=@@ heads"),
    ("query's token", FULL, "query(angles, @token * heads + @@row - 1"),
    ("query's head", FULL, "token * heads + row@ - 1@@)"),
    ("index query's token", FULL, "@token * params->index_heads + @@row - heads"),
    ("index query's head", FULL, "row - heads - @2@1@)"),
    ("token of a latent", FULL, "x = kv@ + token * (rank + rope)@@;"),
    ("place of a latent", FULL, "y = latents@ + token * rank@@;"),
    ("columns of a latent's squares", FULL, "squares_of(x, 1, rank@@ - 1@, 0.0f"),
    ("count of a latent", FULL, "inverse_root(squares, rank@@ + 1@, params->eps)"),
    ("epsilon of a latent", FULL, "inverse_root(squares, rank, @params->eps@0.0f@)"),
    ("columns of a latent", FULL, "i < rank@@ - 1@; i += kLanes"),
    ("columns of a latent, one more", FULL, "i < rank@@ + 1@; i += kLanes"),
    ("weight of a latent", FULL, "static_cast<float>(norm[@i@0@])"),
    ("column of a RoPE key", FULL, "key = {x@ + rank@@};"),
    ("place of a RoPE key", FULL, "ropes@ + token * rope@@, lane"),
    ("head of a query", FULL, "row = {q@ + head * (nope + rope)@@ + nope}"),
    ("column of a query", FULL, "(nope + rope)@ + nope@@};"),
    ("place of a query", FULL, "y = queries@ + head * (rank + rope)@@ + rank"),
    ("column of the place", FULL, "(rank + rope)@ + rank@@;\n    write"),
    ("token of a key", FULL, "x = index_k@ + token * dim@@;"),
    ("count of a mean", FULL, "static_cast<float>(dim@@ + 1@);"),
    ("columns of a mean", FULL, "sum_of(x, 1, dim@@ - 1@, lane)"),
    ("mean of a key's squares", FULL, "squares_of(x, 1, dim, @mean@0.0f@, lane)"),
    ("epsilon of a key", FULL, "squares, dim, @params->index_eps@0.0f@)"),
    ("place of a key", FULL, "index_keys@ + token * dim@@, lane"),
    ("head of an index query", FULL, "row = {index_q@ + head * dim@@};"),
    ("place of an index query", FULL, "index_queries@ + head * dim@@,"),
    # attention_queries.h
    ("rows after the products", FULL, "(group@ - products@@) * simdgroups"),
    ("row of a simdgroup", FULL, "- products) * simdgroups@ + simd_gid@@;"),
    ("rows", HALVES, "at >= params.rows * used@@ + 1@) {"),
    ("rows, one less", FULL, "at >= params.rows * used@@ - 1@) {"),
    ("token of a row", FULL, "own = token@ + at / params.rows@@;"),
    ("row of a token", FULL, "all.run(angles, own, at@ % params.rows@@)"),
    ("head of a threadgroup", FULL, "head = group@ / params.head_groups@@;"),
    ("rows of a head", FULL, "(group@ % params.head_groups@@ * simdgroups"),
    ("rows of a simdgroup", FULL, "% params.head_groups * simdgroups@ + simd_gid@@) * rows"),
    ("token of a query", FULL, "((@token + min(m, used - 1)@token@) * params.heads"),
    ("tokens past the last", FULL, "((token + @min(m, used - 1)@m@) * params.heads"),
    ("heads of a token", FULL, "params.heads@ + head@@) * columns"),
]  # fmt: skip
UNEMBED = [
    ("place of a value", ATTEND, "y[@column@0@] = static_cast<T>(value);"),
    ("vector", ATTEND, "x[@offsets[m] + @@column + i];"),
    ("value of a lane", VAST, "x[offsets[m] + column@ + i@@];"),
    ("column", VAST, "x[offsets[m]@ + column@@ + i];"),
    ("values", VAST, "i < F::values@@ - 1@; i++) {\n      values[i] = x["),
    ("vector of a tail", ATTEND, "left ? x[@offsets[m] + @@column + i]"),
    ("column of a tail", ATTEND, "left ? x[offsets[m]@ + column@@ + i]"),
    ("value of a tail", ATTEND, "left ? x[offsets[m] + column@ + i@@]"),
    ("values past the last", ATTEND,
        "values[i] = @i < left ? x[offsets[m] + column + i] : T(0)@x[offsets[m] + column + i]@;"),
    ("values past the last, one less", ATTEND, "values[i] = i < left@@ - 1@ ? x["),
    ("block of tokens", VAST, "token = tid.y@ * width@ / 2@;", 1),
    ("tokens", ATTEND, "i < used@@ - 1@; i++) {\n    const size_t first"),
    ("token's splits", ATTEND, "size_t(token@ + i@@) * params.mla.splits"),
    ("block's splits", VAST, "size_t(@token + @@i) * params.mla.splits"),
    ("head's splits", ATTEND, "* params.mla.heads@ + head@@;"),
    ("token's vector", ATTEND, "vector = {vectors@ + i * rank@@};"),
    ("barrier after a token", ATTEND,
        "vector);\n@    threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"),
    ("tokens past the last", ATTEND, "offsets[i] = @min(i, used - 1)@i@ * rank;"),
    ("vectors of tokens", ATTEND, "offsets[i] = min(i, used - 1)@ * rank@@;"),
    ("head of the weight", ATTEND, "at(\n      @head@0@, params.product.rows"),
    ("rows at once", TALL, "step = simdgroups@@ * 2@ * rows;"),
    ("first row", ATTEND, "int row = simd_gid@ * rows@@; row <"),
    ("rows", ATTEND, "row < params.product.rows@@ - 1@; row += step"),
    ("token of a result", VAST, "params.mla.first_token@ + token@@, used"),
]  # fmt: skip
GATE_UP = [
    ("who shares", EXPERTS, "int(tid.y) == pairs@@ - 1@) {"),
    ("slots", EXPERTS, "all_tokens<most>(params.tokens@@ - 1@);\n      return"),
    ("rows shared", EXPERTS,
        "shared_act,\n          params.hidden,\n          params.@shared_@@intermediate"),
    ("tokens of a group", EXPERTS, "group.members[i] = min(@i@0@, tokens - 1)"),
    ("tokens past the last", EXPERTS, "group.members[i] = @min(i, tokens - 1)@i@;"),
    ("count of a group", EXPERTS, "group.count = tokens@@ - 1@;"),
]  # fmt: skip
DOWN_SUM = [
    ("who shares", EXPERTS, "if (@int(simd_gid) == pairs % int(simdgroups)@true@) {"),
    ("weighed", EXPERTS, "scores,\n          @false@true@,"),
    ("terms shared", EXPERTS, "terms@ + pairs * rows@@,"),
    ("term of a token", EXPERTS, "terms[(pairs@ + token@@) * rows"),
    ("rounding of the sum", EXPERTS, "value = @glm_fused::round_to(sum, type)@sum@;"),
    ("rounding with the shared", EXPERTS, "value =\n          @glm_fused::round_to(value + "
        "terms[(pairs + token) * rows + r], type)@value + terms[(pairs + token) * rows + r]@;"),
    ("residual", EXPERTS, "params.adds ? @static_cast<float>(residual[at]) + @@value"),
    ("place of the residual", ROUTED, "residual[@at@0@]"),
    ("rounding before the residual", ROUTED, "value = @glm_fused::round_to(sum, type)@sum@;"),
]  # fmt: skip
MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (
        ("project", PROJECT),
        ("attention_queries", QUERIES),
        ("mla_unembed", UNEMBED),
        ("moe_gate_up", GATE_UP),
        ("moe_down_sum", DOWN_SUM),
    )
    for name, case, *change in table
]  # fmt: skip
mutants = Mutants(MUTATIONS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shaders_themselves_are_clean(case):
    launches = mutants.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with cpu():
        expected = case.run()
    made = [bytes for launch in launches for bytes in launch.outputs.values()]
    for a in expected:
        assert bytes(memoryview(mx.contiguous(a).view(mx.uint8))) in made


@pytest.mark.parametrize("changed", mutants.params(MUTATIONS), ids=str)
def test_mutation_is_caught(changed):
    assert mutants.caught_by(changed)
