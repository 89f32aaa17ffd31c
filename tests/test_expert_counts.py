"""Layers with unlike numbers of experts have the bits of a model whose further ones never win."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from expert_counts import unlike_experts

from glm_fused.loader import load_model
from glm_fused.models.config import args_from_config
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack

COUNTS = [0, 8, 4, 6, 3]
TOKENS = mx.array([np.random.default_rng(1).integers(0, 256, 40).tolist()])


def logits(path, **options):
    return np.array(load_model(path, **options)[0](TOKENS).astype(mx.float32))


def never_chosen(tensors):
    """Forbid experts that the pruned checkpoint lacks, by their biases."""
    for layer, count in enumerate(COUNTS):
        if count:
            name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            tensors[name] = mx.where(mx.arange(8) < count, tensors[name], -100.0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return logits(write_checkpoint(tmp_path_factory.mktemp("all"), edit=never_chosen))


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_same_bits_as_with_experts_that_never_win(checkpoint, expected, layout):
    assert np.array_equal(logits(unlike_experts(checkpoint, COUNTS, layout=layout)), expected)


@pytest.mark.parametrize(
    "options", [{"slots": 3}, {"slots": 8}, {"slots": 4, "spares": 1}], ids=str
)
def test_streamed_with_the_same_bits(checkpoint, expected, options):
    path = unlike_experts(checkpoint, COUNTS, layout="hf")
    model, _ = load_model(path, stream=StreamOptions(**options))
    assert np.array_equal(np.array(model(TOKENS).astype(mx.float32)), expected)
    most = options["slots"]
    slots = {i: bank.arrays[0].shape[0] for i, bank in model.streaming.banks.items()}
    assert slots == {i: min(most, count) for i, count in enumerate(COUNTS) if count}
    plan = model.streaming.plan
    assert plan.slot_bytes == 3 * 128 * 128 * 2 * sum(slots.values())


def test_packed_into_a_sidecar(checkpoint, expected, tmp_path):
    path = unlike_experts(checkpoint, COUNTS, layout="hf")
    pack(path, tmp_path / "sidecar")
    stream = StreamOptions(slots=3, sidecar=tmp_path / "sidecar")
    assert np.array_equal(logits(path, stream=stream), expected)


def test_budget_counts_no_slots_beyond_a_layer(checkpoint):
    path = unlike_experts(checkpoint, COUNTS)
    plan = load_model(path, stream=StreamOptions(budget=2 << 30))[0].streaming.plan
    assert (plan.slots, plan.experts) == (8, 8)
    assert plan.slot_bytes == 3 * 128 * 128 * 2 * sum(COUNTS)


CONFIGS = {
    "no list": (8, "must be a list of 5 entries .* and one for the MTP layer, found 8"),
    "short": ([0, 8, 8], r"list of 5 entries .* MTP layer, not 3, found \[0, 8, 8\]"),
    "long": ([0, *[8] * 9], "not 10, found"),
    "dense layer": ([3, 8, 4, 6, 3, 8], r"per_layer\[0\] must be 0, as layer 0 is dense, found 3"),
    "none": ([0, 8, 0, 6, 3, 8], r"per_layer\[2\] must be at least 1, as layer 2 has routed exp"),
    "text": ([0, 8, "4", 6, 3, 8], r"per_layer\[2\] must be an integer"),
    "negative": ([0, 8, -4, 6, 3, 8], r"per_layer\[2\] must be an integer"),
    "odd": (
        [0, 8, 1, 6, 3, 8],
        r"num_experts_per_tok must be at most the 1 selectable of num_routed",
    ),
    "maximum": (
        [0, 7, 4, 6, 3, 7],
        "n_routed_experts must be 7, the largest of num_routed_experts",
    ),
}


@pytest.mark.parametrize(("listed", "message"), CONFIGS.values(), ids=CONFIGS)
def test_impossible_lists(listed, message):
    with pytest.raises(ValueError, match=message):
        args_from_config(tiny_config(num_routed_experts_per_layer=listed))


def test_groups_divide_every_number():
    config = tiny_config(num_routed_experts_per_layer=[0, 8, 4, 6, 3, 8], n_group=2)
    with pytest.raises(
        ValueError, match=r"n_group must be a divisor of num_routed_.* \(3\), found 2"
    ):
        args_from_config(config)


def test_list_without_the_maximum():
    config = tiny_config(num_routed_experts_per_layer=[0, 7, 4, 6, 3, 5])
    del config["n_routed_experts"]
    args = args_from_config(config)
    assert args.n_routed_experts == 7
    assert [layer.experts for layer in (*args.layers, *args.mtp_layers)] == [0, 7, 4, 6, 3, 5]


@pytest.mark.parametrize("layout", ["mlx", "hf", "hf-fused"])
@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([0, 8, 7, 8, 8, 8], r"layers\.2 has tensors of 8 experts, but num_.*\[2\] .* is 7"),
        ([0, 8, 8, 8, 8, 6], r"layers\.5 has tensors of 8 experts, but num_.*\[5\] .* is 6"),
    ],
    ids=["decoder", "MTP"],
)
def test_list_that_contradicts_the_tensors(checkpoint, layout, listed, message):
    path = checkpoint(layout=layout, mtp=True)
    config = json.loads((path / "config.json").read_text())
    config["num_routed_experts_per_layer"] = listed
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_tensors_that_contradict_each_other(checkpoint):
    gate = "model.layers.2.mlp.gate.weight"
    path = unlike_experts(checkpoint, COUNTS, lambda t: t.update({gate: t[gate][:3]}), layout="hf")
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.gate\.weight .* is BF16 \[3, 128\], exp"
    ):
        load_model(path)
