"""Several ranks give the bits of one process."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import ring
from conftest import tiny_config, write_checkpoint
from shard_program import bits, steps_of

from glm_fused import load_model
from glm_fused.formats.weights import FORMATS
from glm_fused.models.config import args_from_config
from glm_fused.models.ranks import Cut
from glm_fused.models.shard import Sharding, cut_of, row_unit
from glm_fused.models.tensors import Module, modules

PROGRAM = ring.TESTS / "shard_program.py"
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
LARGER = {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256}


def add_biases(tensors):
    """Those that attention may have."""
    for name, weight in list(tensors.items()):
        if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight", "o_proj.weight")):
            bias = mx.arange(weight.shape[0]) % 7 / 8
            tensors[name.replace("weight", "bias")] = bias.astype(mx.bfloat16)


KINDS = {  # whole tiles of FP8 are 128 rows; 512 columns have MLX's fast order
    "fp8": (
        tiny_config(**LARGER, qk_nope_head_dim=96, v_head_dim=96, head_dim=128),
        {"layout": "fp8"},
    ),
    "mxfp4": (
        tiny_config(**LARGER, attention_bias=True),
        {"quantization": MXFP4, "edit": add_biases},
    ),
    "hf": (tiny_config(), {"layout": "hf"}),
    "hf-fused": (tiny_config(), {"layout": "hf-fused"}),
    "tied": (tiny_config(tie_word_embeddings=True, n_shared_experts=0), {}),
    "two": (tiny_config(n_shared_experts=2, num_attention_heads=5), {"dtype": "float32"}),
}


def alone(path):
    """The bits that a model gives in one process."""
    model, _ = load_model(path, mtp=True)
    return bits(steps_of(model))


@pytest.fixture(scope="module")
def demo():
    return alone("demo")


def of_ranks(size, folder, split="rows", models=("demo",), mtp=True):
    """The bits of each model and rank."""
    command = [PROGRAM, folder, split, *models]
    ends = ring.finish(ring.start([command] * size, folder, MTP=str(int(mtp))))
    assert [code for code, _, _ in ends] == [0] * size, ends
    files = (
        folder / f"{ring.Path(model).name}.{rank}.npz" for model in models for rank in range(size)
    )
    return [dict(np.load(file)) for file in files]


def differing(found, expected):
    """The steps whose bits differ."""
    assert found.keys() == expected.keys()
    return [step for step in expected if not np.array_equal(found[step], expected[step])]


@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_ranks_give_the_bits_of_one_process(demo, tmp_path, size):
    """Of three ranks parts are uneven."""
    for found in of_ranks(size, tmp_path):
        assert differing(found, demo) == []


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_are_recorded_with_their_gathers(demo, tmp_path, size):
    """Three steps of a token, one of three, a draft and a batch's step; first drafts are not."""
    for found in of_ranks(size, tmp_path, "recorded"):
        assert found.pop("recorded") == 6
        assert differing(found, demo) == []


def test_steps_without_their_gathers_are_noticed(demo, tmp_path):
    for found in of_ranks(2, tmp_path, "unjoined"):
        assert found.pop("recorded") == 6
        assert len(differing(found, demo)) >= 6


def test_a_matrix_split_by_columns_is_noticed(demo, tmp_path):
    for found in of_ranks(2, tmp_path, "columns"):
        assert len(differing(found, demo)) > len(demo) // 2


@pytest.mark.slow
@pytest.mark.parametrize("split", ["rows", "recorded"])
def test_kinds_of_models(tmp_path, split):
    for name, (config, how) in KINDS.items():
        write_checkpoint(tmp_path / name, config, mtp=True, **how)
    paths = [tmp_path / name for name in KINDS]
    found = of_ranks(2, tmp_path, split, models=paths)
    for i, path in enumerate(paths):
        expected, of_both = alone(path), found[2 * i : 2 * i + 2]
        if split == "recorded":  # biases are left to the layers
            has_biases = "mxfp4" in str(path)
            assert [each.pop("recorded") for each in of_both] == [0 if has_biases else 6] * 2, path
        assert [differing(each, expected) for each in of_both] == [[], []], path


@pytest.mark.parametrize(("count", "ranks", "together"), [(64, 3, 1), (8, 8, 1), (1216, 3, 8)])
def test_parts_cover_everything(count, ranks, together):
    cut = Cut.of(count, ranks, together)
    own = []
    for rank in range(ranks):
        part = list(range(count))[cut.part(rank)]
        assert len(part) == cut.width
        assert part[0] % together == 0
        own += part[cut.own(rank)]
    assert own == list(range(count))
    assert cut.width - count // ranks < 2 * together


def module(rows, columns, **how):
    return Module("some.module", (rows, columns), "attention", **{"shard": 0} | how)


@pytest.mark.parametrize(
    ("given", "fmt", "ranks", "message"),
    [
        (module(16, 64), "bf16", 3, "of which 8 stay together: not enough for 3 ranks"),
        (module(15, 512), "affine4", 2, "parts of 8 that begin at 0, 7: expected parts of whole"),
        (module(20, 512), "affine4", 2, None),
        (module(12, 64), "affine4", 2, None),
        (
            module(200, 256),
            "fp8",
            2,
            "that begin at 0, 100: .* of whole blocks of 128",
        ),
        (module(4 * 12, 512, together=12), "mxfp4", 4, "parts of 12 that begin at 0, 12, 24, 36"),
        (module(4 * 12, 512, together=12), "mxfp4", 2, None),
    ],
)
def test_what_cannot_be_split(given, fmt, ranks, message):
    """20 rows are no whole tiles, nor are 10: both have MLX's general order."""
    how = given, FORMATS[fmt], row_unit([FORMATS[fmt]]), 1, ranks
    if message is None:
        cut_of(*how)
        return
    with pytest.raises(
        ValueError, match=rf"\[shard\] some.module has {given.shape[0]} rows.*{message}"
    ):
        cut_of(*how)


def test_heads_share_no_stored_block():
    """Blocks are of 128 rows; a head has 448 of kv_b_proj."""
    heads = {"num_attention_heads": 64, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64}
    config = tiny_config(**LARGER, **heads, v_head_dim=256, vocab_size=512)
    args = args_from_config(config | {"moe_intermediate_size": 384})
    ranks = SimpleNamespace(rank=0, size=3)
    embed_q, q_b = (f"model.layers.0.self_attn.{name}" for name in ("embed_q", "q_b_proj"))
    assert Sharding.of(args, {}, ranks).cuts[embed_q].bounds == (0, 21, 42, 64)
    cuts = Sharding.of(args, {}, ranks, 128).cuts
    assert cuts[embed_q].bounds == (0, 20, 42, 64)
    assert cuts[q_b].bounds == (0, 20 * 256, 42 * 256, 64 * 256)


def test_what_every_rank_has():
    """Norms, projections to latents, the indexer and the router; a head that is the embedding."""
    whole = {
        m.path.rpartition(".")[2]
        for m in modules(args_from_config(tiny_config()))
        if m.shard is None
    }
    assert whole == {
        "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "norm",
        "q_a_proj", "kv_a_proj_with_mqa", "wq_b", "wk", "k_norm", "weights_proj", "gate",
    }  # fmt: skip
    tied = args_from_config(tiny_config(tie_word_embeddings=True))
    assert next(modules(tied)).shard is None
