"""The whole way to a Metal kernel, from Python through `eval_gpu` to the shader; on a Mac it leads
to its GPU, elsewhere to the simulated host."""

import logging
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import (
    DTYPES,
    FORMATS,
    GGUFS,
    OURS,
    assert_same_bits,
    format_id,
    random_weight,
)
from metal_backend import GPU, cpu, metal, on_both, simulated_only
from sim.host import compiled

from glm_fused import load, ops
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.cli.demo import PROMPT
from glm_fused.ops import metal_sim, paths, stock


def layer(fmt, dtype="bfloat16", tokens=3, top_k=2, hidden=256, intermediate=128, bank=4, seed=0):
    """The arguments of moe_decode, in one format or, in a list, three."""
    formats = fmt if isinstance(fmt, list) else [fmt] * 3
    rng = np.random.default_rng([seed, tokens, hidden])
    shape = (bank, intermediate, hidden)
    gate, up = (random_weight(rng, shape, fmt, DTYPES[dtype]) for fmt in formats[:2])
    down = random_weight(rng, (bank, hidden, intermediate), formats[2], DTYPES[dtype])
    x = mx.array(rng.standard_normal((tokens, hidden), dtype=np.float32)).astype(DTYPES[dtype])
    slots = np.stack([rng.permutation(bank)[:top_k] for _ in range(tokens)]).astype(np.int32)
    scores = mx.array(rng.random(slots.shape, dtype=np.float32))
    return x, gate, up, down, mx.array(slots), scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fmt", [("affine", 4, 64), ("mxfp4", 4, 32), ("dense", 0, 0), *OURS], ids=format_id
)
def test_moe_decode_equals_cpu(fmt, dtype):
    arguments = layer(fmt, dtype)
    assert_same_bits(*on_both(lambda: ops.moe_decode(*arguments)))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [*FORMATS, *OURS], ids=format_id)
def test_moe_decode_equals_cpu_in_every_format(fmt):
    arguments = layer(fmt, tokens=5)
    assert_same_bits(*on_both(lambda: ops.moe_decode(*arguments)))


@pytest.mark.parametrize("fmt", OURS, ids=format_id)
def test_factors_equal_cpu_in_the_fast_order(fmt):
    arguments = layer(fmt, hidden=512, intermediate=512)
    assert_same_bits(*on_both(lambda: ops.moe_decode(*arguments)))


# Three formats a layer, each of them once.
TRIPLES = [GGUFS[i::6] for i in range(6)]


@pytest.mark.parametrize("formats", TRIPLES, ids=lambda formats: "-".join(map(format_id, formats)))
def test_moe_decode_of_ggufs_blocks_equals_cpu(formats):
    dtype = list(DTYPES)[TRIPLES.index(formats) % 3]
    hidden = 512 if TRIPLES.index(formats) % 2 else 768  # whole lanes of all 32, or not
    arguments = layer(formats, dtype, tokens=2, hidden=hidden, intermediate=256)
    assert_same_bits(*on_both(lambda: ops.moe_decode(*arguments)))


def test_slices_and_other_layouts_are_accepted():
    x, gate, up, down, slots, scores = layer(("affine", 4, 64), tokens=4)
    wide = mx.repeat(x, 2, axis=1)[:, ::2]
    arguments = (wide[::2], gate, up, down, slots.astype(mx.uint32)[::2], scores.T.T[::2])
    assert_same_bits(*on_both(lambda: ops.moe_decode(*arguments)))


@pytest.mark.parametrize("experts, groups", [(256, 1), (24, 4)])
def test_router_topk_equals_cpu(experts, groups):
    rng = np.random.default_rng(experts)
    draw = [(3, 96), (experts, 96), (experts,)]
    x, weight, bias = (mx.array(rng.standard_normal(s, dtype=np.float32)) for s in draw)
    kept = (groups + 1) // 2
    there, here = on_both(
        lambda: ops.router_topk(x, weight, bias, top_k=8, n_group=groups, topk_group=kept)
    )
    for a, b in zip(there, here, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_the_unfused_chain_equal_cpu(dtype):
    rng = np.random.default_rng(3)
    gate, up = (
        mx.array(rng.standard_normal((3, 5, 77), dtype=np.float32) * 4).astype(DTYPES[dtype])
        for _ in range(2)
    )
    scores = mx.array(rng.random((3, 5), dtype=np.float32))
    assert_same_bits(*on_both(lambda: ops.swiglu(gate, up)))
    assert_same_bits(*on_both(lambda: ops.expert_sum(gate, scores)))


def test_the_unfused_chain_is_what_moe_decode_fuses():
    x, gate, up, down, slots, scores = layer(("dense", 0, 0), "float32", tokens=2)
    with metal():
        exact = stock.moe_decode(x, gate, up, down, slots, scores)
        fused = ops.moe_decode(x, gate, up, down, slots, scores)
        mx.eval(exact, fused)
    if GPU:
        assert_same_bits(exact, fused)
    np.testing.assert_allclose(np.array(exact), np.array(fused), rtol=1e-4, atol=1e-5)


@simulated_only
def test_two_launches_and_clean():
    arguments = layer(("affine", 4, 64), tokens=2)
    with metal(trace=True):
        mx.eval(ops.moe_decode(*arguments))
    launches = metal_sim.take_launches()
    assert [launch.kernel.split("_")[2:5] for launch in launches] == [
        ["moe", "gate", "up"],
        ["moe", "down", "sum"],
    ]
    for launch in launches:
        assert launch.report.clean, launch.report
    distinct = len(np.unique(np.array(arguments[4])))
    used = arguments[1].planes[0].nbytes * distinct // arguments[1].planes[0].shape[0]
    assert launches[0].report.traffic[2].unique_read == used
    assert launches[0].report.traffic[2].read <= 1.05 * used


@simulated_only
def test_tiles_change_the_grid_and_not_the_bits():
    arguments = layer(("mxfp4", 4, 32))
    found = []
    for tiles in ((1, 1, 1, 1), (8, 4, 16, 2)):
        with metal(tiles=tiles):
            y = ops.moe_decode(*arguments)
            mx.eval(y)
        found.append((y, [launch.groups for launch in metal_sim.take_launches()]))
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1] == [(128, 6, 1), (256, 1, 1)]
    assert found[1][1] == [(4, 6, 1), (32, 1, 1)]


@pytest.mark.parametrize("tiles", ["", "4", "3,1,1,1", "4,2,8,33", "4,2,8,32,1", "a,b,c,d"])
def test_tiles_that_cannot_be_are_refused(monkeypatch, tiles):
    monkeypatch.setenv("GLM_FUSED_METAL_TILES", tiles)
    with metal(), pytest.raises(ValueError, match=r"GLM_FUSED_METAL_TILES .* but is " + tiles):
        mx.eval(ops.moe_decode(*layer(("dense", 0, 0))))


def test_many_rows_that_are_no_prompt_take_stock_ops_and_debug_says_so(monkeypatch, caplog):
    monkeypatch.setenv("GLM_FUSED_DEBUG", "1")
    arguments = layer(("affine", 4, 64), tokens=17)
    with metal(), caplog.at_level(logging.DEBUG, "glm_fused"):
        mx.eval(ops.moe_decode(*arguments, prompt=False))
    assert "17 tokens" in caplog.text
    assert GPU or metal_sim.take_launches() == []


def test_too_many_choices_warn_once_and_are_right(monkeypatch):
    monkeypatch.setattr(paths, "_fallen_back", set())
    x, gate, up, down, *_ = layer(("dense", 0, 0), tokens=16, hidden=32, intermediate=8)
    slots = mx.zeros((16, 60), mx.int32)
    scores = mx.full((16, 60), 1 / 60)
    with metal(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = ops.moe_decode(x, gate, up, down, slots, scores)
            mx.eval(y)
    (warning,) = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    assert "960 choices are more than 910" in str(warning.message)
    with cpu():
        expected = ops.moe_decode(x, gate, up, down, slots, scores)
    np.testing.assert_allclose(
        np.array(y.astype(mx.float32)), np.array(expected.astype(mx.float32)), rtol=0.05, atol=0.05
    )


def test_too_many_experts_are_routed_on_the_cpu(monkeypatch):
    monkeypatch.setattr(paths, "_fallen_back", set())
    x, weight, bias = mx.ones((1, 8)), mx.zeros((1025, 8)), mx.arange(1025) / 1025
    with metal(), pytest.warns(RuntimeWarning, match="1025 experts are more than 1024"):
        chosen, _ = ops.router_topk(x, weight, bias, top_k=2)
    assert chosen.tolist() == [[1024, 1023]]


@simulated_only
def test_a_shader_that_does_not_compile_is_an_error():
    def refuse(*_):
        raise RuntimeError("error: no such type")

    arguments = layer(("affine", 4, 64))
    with metal(compiler=refuse), pytest.raises(RuntimeError, match="no such type"):
        mx.eval(ops.moe_decode(*arguments))


@simulated_only
def test_the_simulator_is_loaded_by_the_extension_on_first_use(tmp_path):
    program = """
import sys
import mlx.core as mx
from glm_fused import ops
from glm_fused.ops import metal_sim
assert metal_sim.unavailable() == ""
path = list(sys.path)
assert not any(name.split(".")[0] == "sim" for name in sys.modules)
with metal_sim.simulated():
    mx.eval(ops.swiglu(mx.ones((2, 3)), mx.ones((2, 3))))
print([launch.kernel for launch in metal_sim.take_launches()], sys.path == path)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout == "['glm_fused_swiglu_float_'] True\n"


@simulated_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_kernel_writes_is_nan(dtype):
    def writes_nothing(name, text):
        return compiled(name, text.replace("act[i] =", "const T act_i ="), True, False)

    gate = mx.ones((3, 5)).astype(DTYPES[dtype])
    with metal(compiler=writes_nothing):
        act = ops.swiglu(gate, gate)
        mx.eval(act)
    assert mx.isnan(act).all()


@simulated_only
def test_launches_that_are_not_run_are_noted():
    asked = []

    def no_library(name, text):
        asked.append(name)

    with metal(compiler=no_library):
        mx.eval(ops.moe_decode(*layer(("affine", 4, 64))))
    launches = metal_sim.take_launches()
    assert [launch.kernel for launch in launches] == asked
    assert [launch.groups for launch in launches] == [(16, 6, 1), (64, 1, 1)]
    assert all(launch.report is None for launch in launches)


def test_every_thread_reaches_the_kernels():
    """MLX lets no thread use the stream of another."""

    def both():
        arguments = layer(("affine", 4, 64))
        return on_both(lambda: ops.moe_decode(*arguments))

    with ThreadPoolExecutor(1) as other:
        assert_same_bits(*other.submit(both).result())
    assert_same_bits(*both())


@simulated_only
def test_a_launch_with_more_threads_than_the_kernel_takes_is_an_error():
    def limited(name, text):
        return compiled(name, text.replace("kThreads = 256", "kThreads = 64"), True, False)

    with metal(compiler=limited), pytest.raises(RuntimeError, match=r"256 threads .* takes 64\."):
        mx.eval(ops.swiglu(mx.ones((3, 500)), mx.ones((3, 500))))


@simulated_only
@pytest.mark.parametrize("in_place", [False, True])
def test_a_launch_that_fails_is_an_error_with_its_place(in_place):
    def far_off(name, text):
        return compiled(name, text.replace("act[i] =", "act[i + 9999999999ul] ="), True, False)

    with metal(compiler=far_off, in_place=in_place), pytest.raises(RuntimeError, match="swiglu"):
        mx.eval(ops.swiglu(mx.ones((3, 5)), mx.ones((3, 5))))


@simulated_only
def test_reference_inside_the_simulation_is_the_cpus():
    arguments = layer(("affine", 4, 64))
    with metal():
        y = ops.moe_decode(*arguments, reference=True)
        mx.eval(y)
    assert metal_sim.take_launches() == []
    assert_same_bits(y, ops.moe_decode(*arguments))


def prefill(model, tokens):
    """The cache after a prompt, and the logits."""
    cache = model.make_cache()
    logits = model(mx.array([tokens]), cache=cache)[:, -1]
    mx.eval(logits, [entry.state for entry in cache])
    return cache, logits


def decode(model, cache, logits, steps):
    """The logits of `steps` greedy steps."""
    rows = []
    for _ in range(steps):
        logits = model(mx.argmax(logits, axis=-1)[None], cache=cache)[:, -1]
        mx.eval(logits)
        rows.append(logits)
    return mx.concatenate(rows)


def kinds_of_layers(model):
    """How many layers there are, how many have experts and how many an indexer."""
    layers = model.args.layers
    return len(layers), sum(x.is_sparse for x in layers), sum(x.is_full for x in layers)


@pytest.mark.slow
def test_demo_model_decodes_as_on_the_cpu():
    model, tokenizer = load(bundled_folder())
    prompt, steps = tokenizer.encode(PROMPT)[:90], 32
    with cpu():
        here = decode(model, *prefill(model, prompt), steps)
        begun = prefill(model, prompt)
    with metal():
        there = decode(model, *begun, steps)
    assert_same_bits(there, here)
    assert len(set(mx.argmax(there, axis=-1).tolist())) > 4
    if not GPU:
        layers, sparse, full = kinds_of_layers(model)
        check_launches(
            {
                "moe_gate_up": steps * sparse,
                "moe_down_sum": steps * sparse,
                "router_select": steps * sparse,
                "mla_split": steps * layers,
                "mla_unembed": steps * layers,
                "index_scores": steps * full,
                "index_select": steps * full,
                # Three of attention; of a dense MLP two, of experts one.
                "project": steps * (5 * layers - sparse),
                "attention_queries": steps * layers,
                "rms_norm": steps,  # before the head
                # New latents and their RoPE keys, new keys of the indexer; nothing else is copied.
                "copy_pair": steps * layers,
                "copy_rows": steps * full,
            }
        )


def test_demo_model_on_a_prompt():
    """Its logits are those of the CPU but for what the order of sums changes."""
    model, tokenizer = load(bundled_folder())
    prompt = tokenizer.encode(PROMPT)[:90]
    with metal():
        there = np.array(prefill(model, prompt)[1].astype(mx.float32))
    with cpu():
        here = np.array(prefill(model, prompt)[1].astype(mx.float32))
    assert np.sqrt(np.mean((there - here) ** 2)) < 0.02 * here.std()
    if not GPU:
        layers, sparse, full = kinds_of_layers(model)
        check_launches(
            {
                "router_logits": sparse,
                "router_select": sparse,
                "group_pairs": sparse,
                "grouped_gate_up": sparse,
                "grouped_down": sparse,
                "expert_sum": sparse,
                "mla_prompt": layers,
                "index_prompt": full,
                "index_select": full,
                # Of a layer: its two norms, those of q's and the keys' latents; then the last one.
                "rms_norm": 1 + 4 * layers,
                "layer_norm": full,
                # That of shared experts, or of a dense MLP.
                "swiglu": layers,
                # Of a layer its queries and keys, and those of its indexer.
                "rotate_rows": 2 * (layers + full),
                "copy_pair": layers,
                "copy_rows": full,
            }
        )


def check_launches(expected):
    """Fail unless the launches since the last call were those, by their kernels' beginnings."""
    launches = metal_sim.take_launches()
    names = [launch.kernel.removeprefix("glm_fused_") for launch in launches]
    count = {name: sum(n.startswith(name) for n in names) for name in expected}
    assert count == expected
    assert len(launches) == sum(count.values())
