"""One answer tells which code runs an op; ops, debug output, self-test and reports read it."""

import logging
import warnings

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES, assert_same_bits, random_weight
from metal_backend import GPU, simulated_only

from glm_fused import _ext, ops
from glm_fused.models.decode_routes import attention_routes, explain, mlp_routes, path_taken
from glm_fused.ops import metal_sim, paths, routes
from glm_fused.ops.routes import Kernel, Route, choose
from glm_fused.selftest.cases import cases

SIZES = {"moe_decode": (1, 8), "router_topk": (256,), "sparse_mla_decode": (2048,)}
TABLE = {  # fused on a CPU and a GPU, reference on a CPU and a GPU
    "quantized_matvec": ("cpu", "mlx", "loops", "mlx"),
    "expert_matvec": ("cpu", "mlx", "loops", "mlx"),
    "moe_decode": ("cpu", "metal", "loops", "mlx"),
    "router_topk": ("cpu", "metal", "loops", "loops"),
    "rms_norm": ("cpu", "metal", "loops", "loops"),
    "layer_norm": ("cpu", "metal", "loops", "loops"),
    "rotate": ("cpu", "metal", "loops", "loops"),
    "append_rows": ("cpu", "metal", "mlx", "mlx"),
    "indexer_topk": ("cpu", "metal", "loops", "loops"),
    "sparse_mla_decode": ("cpu", "metal", "loops", "loops"),
}


@pytest.fixture
def a_mac(monkeypatch):
    """A GPU with Metal, as far as the choice of a route can tell."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    for name in ("moe_decode", "router_topk", "sparse_mla_decode"):
        monkeypatch.setattr(_ext, f"{name}_obstacle", lambda *_: "")


@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("column", range(4))
def test_the_table(a_mac, op, column):
    device, reference = (mx.cpu, mx.gpu)[column % 2], column >= 2
    route = choose(op, *SIZES.get(op, ()), stream=device, reference=reference)
    assert route.kernel is Kernel[TABLE[op][column]]
    assert (route.op, route.fell_back) == (op, False)
    assert ("asked for" in route.reason) is reference
    cell = "metal" if TABLE[op][column] == "metal" else TABLE[op][column]
    (row,) = [line for line in routes.__doc__.splitlines() if line.startswith(op)]
    assert f"``{cell}``" in row


def test_a_stream_says_its_device():
    for stream in (mx.cpu, mx.Device(mx.cpu), mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)):
        assert not routes.is_gpu(stream)
    assert routes.is_gpu(mx.gpu)
    assert routes.is_gpu(mx.Device(mx.gpu))
    assert routes.is_gpu(None) is (mx.default_device() == mx.gpu)


def test_a_prompt_on_a_gpu_has_kernels_of_its_own(a_mac):
    prompt = Route("moe_decode", Kernel.metal_prompt)
    assert choose("moe_decode", 17, 8, stream=mx.gpu) == prompt
    assert choose("moe_decode", 16, 8, stream=mx.gpu).kernel is Kernel.metal
    assert choose("moe_decode", 2, 8, stream=mx.gpu, prompt=True) == prompt
    route = choose("moe_decode", 17, 8, stream=mx.gpu, prompt=False)
    assert route == Route("moe_decode", Kernel.mlx, "17 tokens that are no prompt")
    assert str(route) == "moe_decode mlx (17 tokens that are no prompt)"
    assert choose("moe_decode", 17, 8, stream=mx.cpu).kernel is Kernel.cpu
    indexer = choose("indexer_topk", stream=mx.gpu, prompt=True)
    assert indexer == Route("indexer_topk", Kernel.metal_prompt)
    assert choose("indexer_topk", stream=mx.gpu, prompt=False).kernel is Kernel.metal


def test_what_a_kernel_does_not_take_falls_back(a_mac, monkeypatch):
    monkeypatch.setattr(_ext, "router_topk_obstacle", lambda n: f"{n} experts are too many")
    route = choose("router_topk", 999, stream=mx.gpu)
    assert route == Route("router_topk", Kernel.cpu, "999 experts are too many", True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    for op in ("rms_norm", "layer_norm", "rotate", "indexer_topk", "router_topk"):
        kernel = Kernel.cpu if op == "router_topk" else Kernel.mlx
        route = choose(op, *SIZES.get(op, ()), stream=mx.gpu)
        assert route == Route(op, kernel, "MLX finds no Metal device", True)


def test_a_fall_back_warns_once_and_debug_says_all(a_mac, monkeypatch, caplog):
    monkeypatch.setattr(paths, "_fallen_back", set())
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setenv("GLM_FUSED_DEBUG", "1")
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        for _ in range(2):
            routes.take("indexer_topk", stream=mx.gpu, reference=None)
    assert [str(w.message) for w in caught] == [
        "indexer_topk runs without its Metal kernels: MLX finds no Metal device"
    ]
    assert caplog.text.count("indexer_topk: no Metal kernel") == 2


def test_the_path_taken_names_what_falls_back(demo_args, monkeypatch):
    assert path_taken(demo_args) == "fused"
    with paths.reference_path():
        assert path_taken(demo_args) == "reference"
    if not metal_sim.unavailable():
        monkeypatch.setattr(_ext, "router_topk_obstacle", lambda n: f"{n} experts are too many")
        with metal_sim.simulated():
            found = path_taken(demo_args)
        experts = demo_args.n_routed_experts
        assert found == f"fused, but router_topk cpu ({experts} experts are too many)"


def test_a_step_on_metal_has_matrices_in_blocks(demo_args):
    if metal_sim.unavailable():
        pytest.skip(metal_sim.unavailable())
    layers = demo_args.layers
    with metal_sim.simulated():
        made = [
            r for x in layers for r in (*attention_routes(demo_args, x), *mlp_routes(demo_args, x))
        ]
    assert {route.kernel for route in made} == {Kernel.metal}
    assert "quantized_matvec" in explain(made)


@pytest.fixture(scope="module")
def demo_args():
    from glm_fused.checkpoint.folder import Checkpoint
    from glm_fused.models.config import args_from_config

    return args_from_config(Checkpoint.open("demo").config)


def some_of_each():
    """The first case of each op with its smallest number of tokens."""
    smallest = {}
    for case in sorted(cases(quick=True), key=lambda case: case.tokens):
        smallest.setdefault(case.op, case)
    return [case for op, case in smallest.items() if hasattr(ops, op)]  # not whole layers


@pytest.mark.parametrize("case", some_of_each(), ids=lambda case: case.op)
def test_ops_run_where_they_are_told_to(case):
    arguments = case.arguments()
    stream = mx.new_stream(mx.cpu)
    found = {}
    for where in (mx.cpu, stream):
        out = getattr(ops, case.op)(**arguments, stream=where)
        found[where] = out if isinstance(out, tuple) else (out,)
        mx.eval(found[where])
    for a, b in zip(found[mx.cpu], found[stream], strict=True):
        assert_same_bits(a, b)


def test_steps_run_where_they_are_told_to():
    x = mx.random.normal((3, 2, 40))
    angles = mx.ones((1, 1, 2, 9))
    for op, arguments in (
        (ops.swiglu, (x, x)),
        (ops.expert_sum, (x, mx.ones((3, 2)))),
        (ops.rms_norm, (x, x[0, 0], 1e-5)),
        (ops.layer_norm, (x, x[0, 0], x[0, 1], 1e-5)),
        (ops.rotate, (x[None], angles, angles)),
    ):
        assert_same_bits(op(*arguments), op(*arguments, stream=mx.new_stream(mx.cpu)))


def test_a_stream_that_is_none():
    w = random_weight(np.random.default_rng(0), (8, 32), ("dense", 0, 0), DTYPES["float32"])
    with pytest.raises(TypeError, match="stream"):
        ops.quantized_matvec(mx.ones((1, 32)), w, stream="cpu")


@simulated_only
def test_the_simulator_takes_what_a_gpu_takes():
    if metal_sim.unavailable():
        pytest.skip(metal_sim.unavailable())
    with metal_sim.simulated():
        for op in TABLE:
            kernel = choose(op, *SIZES.get(op, ())).kernel
            assert kernel is (Kernel.cpu if op in routes._MATRICES else Kernel.metal)
    assert GPU or choose("moe_decode", 1, 8).kernel is Kernel.cpu
