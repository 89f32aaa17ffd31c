"""Streamed experts on Metal: one node a layer, which crosses to the GPU and back once."""

import itertools
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from metal_backend import GPU, cpu, metal, simulated_only
from test_streaming import AFFINE, TOP_K, run, same, stream

from glm_fused import ops
from glm_fused.formats.kv_rows import PACKED
from glm_fused.loader import load_model
from glm_fused.ops import metal_sim

LAYERS, SPARSE = 5, 4


WITHOUT = pytest.param(0, id="no shared", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[pytest.param(1, id="shared"), WITHOUT])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed")
    write_checkpoint(path, tiny_config(n_shared_experts=request.param), quantization=AFFINE)
    return path


def streamed(folder, slots=4, **options):
    return load_model(folder, stream=stream(slots, **options))[0]


@pytest.mark.parametrize("slots", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_bits_are_the_resident_models(folder, slots):
    """A prompt in chunks, of which one needs waves, and steps that are built ahead."""
    with cpu():
        expected = run(load_model(folder)[0], steps=3)
    model = streamed(folder, slots)
    with metal():
        assert same(run(model, steps=3), expected)
    assert model.streaming.stats()["misses"] > SPARSE * TOP_K


def a_step(model, tokens=1):
    """The graph of a step after a prompt, and the cache."""
    cache = model.make_cache()
    mx.eval(model(mx.array([[3, 5, 7, 9]]), cache))
    return model(mx.array([list(range(1, tokens + 1))]), cache), cache


@simulated_only
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_layer_crosses_to_the_gpu_and_back_once(folder, tmp_path, tokens):
    model = streamed(folder)
    with metal():
        logits, _ = a_step(model, tokens)
        mx.export_to_dot(str(tmp_path / "graph.dot"), logits)
        metal_sim.take_launches(), metal_sim.take_waits()
        mx.eval(logits)
    assert metal_sim.take_waits() == SPARSE
    graph = (tmp_path / "graph.dot").read_text()
    found = Counter(re.findall(r'label ?= ?"([A-Za-z0-9_]+)"', graph))
    assert found["StreamedMoe"] == SPARSE
    # No other node is the CPU's: these share memory on the GPU's stream, and launch nothing.
    slots = {name: count for name, count in found.items() if name.startswith("Slots")}
    assert slots == {"SlotsHold": SPARSE, "SlotsRelease": SPARSE, "SlotsVerify": 1}


@simulated_only
def test_shared_experts_are_begun_before_the_reads_are_awaited(folder):
    """They are launched after the router's choice, and need none of what follows it."""
    model = streamed(folder)
    with metal():
        logits, _ = a_step(model)
        metal_sim.take_launches()
        mx.eval(logits)
        names = [x.kernel.removeprefix("glm_fused_") for x in metal_sim.take_launches()]
    chosen = [i for i, name in enumerate(names) if name.startswith("router_select")]
    assert len(chosen) == SPARSE
    for at in chosen:
        after = [name.split("_bfloat16")[0].split("_")[0] for name in names[at + 1 : at + 4]]
        shared = "shared_experts" in model.layers[1].mlp
        assert after[: 2 + shared] == ["project"] * shared + ["moe", "moe"]


def test_lookahead_and_banks_that_are_too_small_run_op_by_op(folder):
    with cpu():
        expected = run(load_model(folder)[0], steps=2)
    for options in ({"slots": 4, "spares": 1}, {"slots": 2}):
        with metal():
            assert same(run(streamed(folder, **options), steps=2), expected)


@pytest.mark.parametrize("slots", [2, 8])
def test_a_prompt_that_is_grouped_by_expert(folder, slots):
    """A wave has few of the prompt's choices or many: all are a prompt's, as in memory."""
    tokens = mx.array([[(7 * i) % 99 for i in range(20)]])
    logits = []
    for model in (load_model(folder)[0], streamed(folder, slots)):
        with metal():
            mx.eval(made := model(tokens, model.make_cache()))
            names = [x.kernel.removeprefix("glm_fused_") for x in metal_sim.take_launches()]
        assert GPU or any(name.startswith("grouped_down") for name in names)
        assert not any(name.startswith("moe_") for name in names)
        logits.append(np.array(made.view(mx.uint16)))
    assert same(*logits)


@pytest.mark.parametrize("kv_format", PACKED)
def test_packed_caches(folder, kv_format):
    with cpu():
        expected = run(load_model(folder, kv_format=kv_format)[0], steps=2)
    model, _ = load_model(folder, kv_format=kv_format, stream=stream(4))
    with metal():
        assert same(run(model, steps=2), expected)


def test_generations_in_one_evaluation_take_turns(folder):
    """Each needs the whole bank of every layer."""
    with cpu():
        whole = load_model(folder)[0]
        expected = [np.array(whole(mx.array([[t]])).view(mx.uint16)) for t in (3, 99, 7)]
    model = streamed(folder, 2)
    with metal():
        mx.eval(results := [model(mx.array([[t]])) for t in (3, 99, 7)])
    for found, right in zip(results, expected, strict=True):
        assert np.array_equal(np.array(found.view(mx.uint16)), right)


def test_a_step_that_is_never_evaluated_leaves_no_lease(folder):
    with cpu():
        expected = run(load_model(folder)[0], steps=2)
    model = streamed(folder, 2)
    with metal():
        model(mx.array([[9]]))
        assert same(run(model, steps=2), expected)


def test_a_read_that_fails_raises(tmp_path):
    write_checkpoint(tmp_path, quantization=AFFINE)
    model, file = streamed(tmp_path), Path(tmp_path / "model.safetensors")
    data = file.read_bytes()
    with metal():
        logits, cache = a_step(model)
        mx.eval(logits)
        with file.open("r+b") as f:
            f.truncate(len(data) // 4)
        with pytest.raises(RuntimeError, match=r"layer \d, expert \d: .*model.safetensors: "):
            for token in itertools.count():
                mx.eval(model(mx.array([[token]]), cache))
        with pytest.raises(RuntimeError, match="this cache is of no use"):
            model(mx.array([[1]]), cache)
    assert all(len(bank.resident()) <= 4 for bank in model.streaming.banks.values())


def test_who_takes_a_use():
    x = mx.zeros((1, 16, 8))
    assert not ops.blocks.takes_on_metal(x)
    with metal():
        assert ops.blocks.takes_on_metal(x)
        assert not ops.blocks.takes_on_metal(mx.zeros((1, 17, 8)))
