"""What inspect says of each layer is what runs there, in every pair of formats that files have."""

import json

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from gguf import quants
from gguf_files import Q, gguf_tensors, write_gguf
from test_gguf_models import KINDS, blocks
from test_streaming import AFFINE

from glm_fused import _ext, load_model, reference_path
from glm_fused.checkpoint.description import describe, format_description
from glm_fused.checkpoint.gguf_formats import format_of
from glm_fused.checkpoint.layer_description import format_layers, ranges
from glm_fused.cli import main
from glm_fused.formats.weights import QUANTIZED
from glm_fused.ops import metal_sim
from glm_fused.ops.routes import Kernel
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack

GGUF_KINDS = ["BF16", "F16", "F32", *KINDS]
SIZES = {
    "hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4, "indexer_types": None,
    "num_nextn_predict_layers": 0, "vocab_size": 256, "intermediate_size": 32,
}  # fmt: skip


def pairs(kinds, shift):
    """For each layer the types of gate, up and down: over all shifts, every pair of types."""
    n = len(kinds)
    return [(kinds[i], kinds[(i + 2 * shift) % n], kinds[(i + shift) % n]) for i in range(n)]


def gguf_model(folder, shift):
    layers = pairs(GGUF_KINDS, shift)
    config = tiny_config(num_hidden_layers=len(layers) + 1, **SIZES)
    raw, dense = {}, gguf_tensors(config, dtype="float32")
    for seed, (name, values) in enumerate(dense.items()):
        kind = "F32"
        if "_exps" in name:
            which = ("ffn_gate", "ffn_up", "ffn_down").index(name.split(".")[2][:-5])
            kind = layers[int(name.split(".")[1]) - 1][which]
        if kind in KINDS:
            raw[name] = blocks(Q[kind], values, seed), Q[kind]
        else:
            raw[name] = quants.quantize(values, Q[kind]), Q[kind]
    path = write_gguf(folder / "m.gguf", config, raw=raw)
    return path, [tuple(str(format_of(kind)) for kind in layer) for layer in layers]


def mlx_model(folder, shift):
    layers = pairs(QUANTIZED, shift)
    config = tiny_config(num_hidden_layers=len(layers) + 1, **SIZES)
    quantization = dict(AFFINE)
    for i, layer in enumerate(layers, 1):
        for projection, fmt in zip(("gate", "up", "down"), layer, strict=True):
            path = f"model.layers.{i}.mlp.switch_mlp.{projection}_proj"
            quantization[path] = dict(fmt.parameters)
    path = write_checkpoint(folder / "model", config, quantization=quantization)
    return path, [tuple(map(str, layer)) for layer in layers]


@pytest.fixture
def launched(monkeypatch):
    """The kernel and the formats of each call for routed experts, in order."""
    calls = []

    def spy(name, kernel_of, experts_of):
        stock = getattr(_ext, name)

        def call(*args, **kwargs):
            formats = tuple(str(w.format) for w in experts_of(args, kwargs))
            calls.append((kernel_of(args, kwargs), formats))
            return stock(*args, **kwargs)

        monkeypatch.setattr(_ext, name, call)

    spy("moe_block", lambda a, k: k["kernel"], lambda a, k: k["experts"])
    spy("moe_decode", lambda a, k: a[7], lambda a, k: a[1:4])
    return calls


def said(path, *more, capsys):
    assert main(["inspect", str(path), *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["each_layer"][1:]


SHIFTS = [
    pytest.param(make, shift, id=f"{make.__name__[:-6]}-{shift}", marks=[pytest.mark.slow] * slow)
    for make, count, quick in (
        (gguf_model, len(GGUF_KINDS), {0, 8}),
        (mlx_model, len(QUANTIZED), {0, 8}),
    )
    for shift in range(count)
    for slow in [shift not in quick]
]


@pytest.mark.parametrize(("make", "shift"), SHIFTS)
def test_what_inspect_says_is_what_runs(tmp_path, launched, capsys, make, shift):
    """A token's experts: in memory, then in slots, then on Metal, whose nodes are made, not run."""
    path, formats = make(tmp_path, shift)
    tokens = mx.array([[5]])
    for more, options in ([], {}), (["--slots", "2"], {"stream": StreamOptions(slots=2)}):
        layers = said(path, *more, capsys=capsys)
        assert [tuple(layer["formats"].values()) for layer in layers] == formats
        assert {layer["path"] for layer in layers} == {"fused"}
        model, _ = load_model(path, **options)
        launched.clear()
        found = model(tokens)
        mx.eval(found)
        assert launched == [(Kernel.cpu, layer) for layer in formats]
        with reference_path():
            assert mx.array_equal(found, model(tokens)).item()
    if metal_sim.unavailable():
        return
    with metal_sim.simulated():
        assert {layer["path"] for layer in said(path, capsys=capsys)} == {"fused"}
        model, _ = load_model(path, compile_kernels=False)
        launched.clear()
        model(tokens)
    assert launched == [(Kernel.metal, layer) for layer in formats]


@pytest.mark.parametrize("layout", ["hf", "hf-fused", "fp8", "mlx"])
def test_bytes_of_a_token(tmp_path, layout):
    path = write_checkpoint(tmp_path / "model", layout=layout)
    found = describe(path)
    layers, tensors = found["each_layer"], found["formats"]
    rest = sum(tensors[kind]["bytes_read_per_token"] for kind in ("embedding", "head"))
    rest += 128 * 2  # the last norm
    each = sum(layer["bytes_read_per_token"] for layer in layers)
    assert each + rest == found["bytes_read_per_token"]
    bits = 8 + 32 / 128**2 if layout == "fp8" else 16
    for layer in layers[1:]:
        assert layer["expert_bytes_per_token"] == 2 * 3 * 128 * 128 * bits / 8  # two of eight
        assert set(layer["formats"].values()) == {"fp8" if layout == "fp8" else "bf16"}
    assert layers[0]["expert_bytes_per_token"] == 0
    assert set(layers[0]["formats"].values()) == {"bf16"}  # FP8 becomes that where it is loaded


def test_where_experts_are(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "model", quantization=AFFINE)
    pack(path, tmp_path / "sidecar")
    for more, source, slots in (
        ([], "memory", None),
        (["--sidecar", str(tmp_path / "sidecar")], "sidecar", None),
        (["--slots", "5"], "safetensors", 5),
        (["--memory-budget", "8GB", "--sidecar", str(tmp_path / "sidecar")], "sidecar", 8),
    ):
        layers = said(path, *more, capsys=capsys)
        assert {(x["experts_from"], x["slots"]) for x in layers} == {(source, slots)}
    assert main(["inspect", str(path), "--slots", "5"]) == 0
    out = capsys.readouterr().out
    most = "up to 61.44 kB a token"  # two experts of three matrices of 128 x 128, 5 bits each
    assert f"8 experts streamed from safetensors into 5 slots, {most}: affine4-g32/" in out
    assert "5 of 8 x 4 layers, for experts" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slots", "1"], "1 slots a layer, expected 2 to 8"),
        (["--memory-budget", "1MB"], "1.00 MB cannot hold"),
        (["--memory-budget", "1"], "--memory-budget: expected a size with its unit"),
        (["--sidecar", "nowhere"], "nowhere has no manifest.json"),
    ],
)
def test_streaming_that_cannot_be(tmp_path, capsys, more, message):
    path = write_checkpoint(tmp_path / "model")
    assert main(["inspect", str(path), *more]) == 2
    assert message in capsys.readouterr().err


def test_alike_layers_share_a_line(tmp_path):
    found = describe(write_checkpoint(tmp_path / "model"))
    lines = format_layers(found["each_layer"], 100)
    assert [line.split("  ")[1] for line in lines[1:]] == ["0", "1, 3", "2, 4"]
    assert "fused, shared, 8 experts in memory: bf16/bf16/bf16" in lines[3]
    assert "\n".join(lines) in format_description(found)
    many = [{**found["each_layer"][1], "layer": i} for i in range(0, 160, 2)]
    (_, *names, line) = format_layers(many, 100)
    assert " ".join(" ".join(names).split()) == ranges(range(0, 160, 2)) and "fused, full" in line
    assert max(map(len, names)) <= 100


def test_what_falls_back_is_said(tmp_path, monkeypatch):
    if metal_sim.unavailable():
        pytest.skip(metal_sim.unavailable())
    path = write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(_ext, "router_topk_obstacle", lambda n: f"{n} experts are too many")
    with metal_sim.simulated():
        layers = describe(path)["each_layer"]
    assert layers[0]["path"] == "fused"
    assert {x["path"] for x in layers[1:]} == {
        "fused, but router_topk cpu (8 experts are too many)"
    }
    with reference_path():
        assert {x["path"] for x in describe(path)["each_layer"]} == {"reference"}
