"""``glm-fused selftest`` finds what is wrong and writes it, and its digests hold."""

from __future__ import annotations

import contextlib
import json
import os
import re
import types
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from glm_fused import _ext, ops
from glm_fused.cli import main
from glm_fused.formats.weights import FORMATS, dequantize
from glm_fused.host import to_numpy
from glm_fused.ops import metal_sim
from glm_fused.selftest import backends, benchmark, compare, machine, microbench, report, synthetic
from glm_fused.selftest.cases import cases
from glm_fused.selftest.expert_cases import MoeDecode, QuantizedMatvec, RouterTopk
from glm_fused.selftest.run import run_backend

AFFINE4 = FORMATS["affine4"]
# Contraction shows in the digests of these.
MOE = next(c for c in cases(True) if c.op == "moe_decode" and c.gate == AFFINE4)
ROUTER = next(c for c in cases(True) if c.op == "router_topk" and c.n_group > 1)
MATVEC = next(c for c in cases(True) if c.op == "quantized_matvec")
FEW = [MOE, ROUTER, MATVEC]


def quiet(_: str) -> None:
    pass


def run(capsys, *args):
    code = main(["selftest", "--backend", "cpu", "--quick", "--no-bench", *map(str, args)])
    return code, *capsys.readouterr()


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(report, "cases", lambda quick: FEW)


@pytest.fixture
def wrong_moe(monkeypatch):
    """moe_decode with the lowest bit of output [1, 7] flipped on the fused path."""
    original = ops.moe_decode

    def wrong(*args, reference, **kwargs):
        y = original(*args, reference=reference, **kwargs)
        if reference:
            return y
        unsigned = {2: mx.uint16, 4: mx.uint32}[y.dtype.size]
        flip = np.zeros(y.shape, np.uint32)
        flip[1, 7] = 1
        return (y.view(unsigned) ^ mx.array(flip).astype(unsigned)).view(y.dtype)

    monkeypatch.setattr(ops, "moe_decode", wrong)


def test_quick_run_passes(capsys, tmp_path):
    target = tmp_path / "report.json"
    code, out, err = run(capsys, "--json", target)
    assert (code, err) == (0, "")
    count = len(cases(quick=True))
    assert f"cpu: {count} of {count} cases passed" in out
    assert "self-test passed" in out
    assert os.listdir(tmp_path) == ["report.json"]
    document = json.loads(target.read_text())
    assert (document["schema"], document["ok"], document["quick"]) == (1, True, True)
    assert document["benchmarks"] is None
    assert document["machine"]["chip"]
    assert document["machine"]["memory_bytes"] > 1 << 28
    assert document["versions"]["mlx"] == mx.__version__
    assert document["versions"]["built with nanobind"] == _ext.built_with_nanobind
    (cpu,) = document["backends"]
    assert (cpu["backend"], cpu["failed"], cpu["contraction_found"]) == ("cpu", 0, "on")
    assert [r["case"] for r in cpu["results"]] == [c.name for c in cases(quick=True)]
    for result in cpu["results"]:
        assert result["equals_reference"] is True
        assert result["golden"] in ("on", "either")
        assert re.fullmatch("[0-9a-f]{64}", result["digest"])


def test_the_report_tells_nothing_personal(capsys, few, monkeypatch):
    monkeypatch.setenv("GLM_FUSED_METAL_TILES", "/home/somebody/tiles")
    _, out, _ = run(capsys, "--json", "-")
    document = json.loads(out)
    assert document["environment"]["GLM_FUSED_METAL_TILES"] == "tiles"
    for private in (os.uname().nodename, os.path.expanduser("~"), os.getcwd(), "/home"):
        assert private not in out


def test_json_alone_on_stdout(capsys, few):
    code, out, err = run(capsys, "--json", "-")
    assert (code, err) == (0, "")
    assert json.loads(out)["backends"][0]["cases"] == 3


def test_a_wrong_result_is_reported(capsys, few, wrong_moe):
    code, out, _ = run(capsys)
    assert code == 1
    assert "cpu: 2 of 3 cases passed" in out
    (line,) = [line for line in out.splitlines() if "FAILED  " in line]
    assert MOE.name in line
    assert "differs from the reference and does not match its golden digest" in line
    assert re.search(
        r"; 1 of \d+ values differ from the reference, first at \[1, 7\] of output 0:"
        r" 0x[0-9a-f]+ and 0x[0-9a-f]+$",
        line,
    )
    assert out.rstrip().endswith("self-test FAILED")
    code, out, _ = run(capsys, "--json", "-")
    assert code == 1
    result = json.loads(out)["backends"][0]["results"][0]
    assert result["difference"]["index"] == [1, 7]
    assert result["golden"] == "neither"


def test_a_wrong_digest_is_reported(capsys, few, monkeypatch):
    digests = {**compare.golden(), ROUTER.name: {"on": "0" * 64, "off": "1" * 64}}
    del digests[MATVEC.name]
    monkeypatch.setattr(compare, "golden", lambda: digests)
    code, out, _ = run(capsys)
    assert code == 1
    assert f"{ROUTER.name}: does not match its golden digest (found: neither)" in out
    assert f"{MATVEC.name}: has no golden digest" in out


def test_an_error_does_not_end_the_run(capsys, few, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Unable to build metal library\n/Users/me/x.metal:3:1: error: bad")

    monkeypatch.setattr(ops, "moe_decode", fail)
    code, out, _ = run(capsys)
    assert code == 1
    assert "raised an error: Unable to build metal library x.metal:3:1: error: bad" in out
    assert "2 of 3" in out


def test_golden_digests_are_of_the_cases():
    names = [c.name for c in cases(quick=False)]
    assert sorted(compare.golden()) == sorted(names), (
        "regenerate: PYTHONPATH=. python tests/make_selftest_golden.py"
    )
    assert len(names) == len(set(names))
    assert {c.name for c in cases(quick=True)} <= set(names)
    # Contraction shows in all kinds of case.
    for op in ("moe_decode", "router_topk", "quantized_matvec"):
        kept = [d for name, d in compare.golden().items() if name.startswith(op)]
        assert any(d["on"] != d["off"] for d in kept)


def test_cases_cover_the_formats():
    moe = [c for c in cases(quick=False) if c.op == "moe_decode"]
    for part in ("gate", "up", "down"):
        found = {(getattr(c, part), c.dtype) for c in moe}
        assert len({fmt for fmt, _ in found}) == len(FORMATS) - 2  # dense is one
        assert len(found) == 3 * (len(FORMATS) - 2)
    assert {c.tokens for c in moe} >= {1, 2, 5, 16}
    assert any((c.hidden, c.intermediate) == (6144, 2048) for c in moe)
    assert any(c.op == "router_topk" and (c.experts, c.top_k) == (256, 8) for c in cases(True))


def test_the_report_is_written_in_one_step(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    report.write({"ok": True}, target)
    assert json.loads(target.read_text()) == {"ok": True}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report.write({"ok": False}, target)
    assert json.loads(target.read_text()) == {"ok": True}
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_report_that_cannot_be_written_is_refused_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "examine", None)
    assert run(capsys, "--json", tmp_path)[0::2] == (
        2,
        f"glm-fused: error: {tmp_path} is a folder, expected a file to write.\n",
    )
    code, _, err = run(capsys, "--json", tmp_path / "none" / "report.json")
    assert code == 2
    assert f"{tmp_path}/none does not exist" in err


def test_a_backend_that_is_not_here(capsys, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert main(["selftest", "--backend", "metal"]) == 2
    assert "backend metal is not usable: MLX finds no Metal device" in capsys.readouterr().err


class OnThisCpu(backends.Backend):
    """A backend that judges as its name says and computes on the CPU."""

    def active(self):
        return mx.stream(mx.cpu)

    def kernels_launched(self):
        return ["moe_gate_up", "moe_down_sum"]


def test_metal_is_compared_with_everything(monkeypatch):
    monkeypatch.setattr(_ext, "moe_decode_obstacle", lambda *_: "")
    monkeypatch.setattr(_ext, "router_topk_obstacle", lambda *_: "")
    result = run_backend(OnThisCpu("metal", None), FEW, quiet)
    assert (result["failed"], result["contraction_found"]) == (0, "on")
    assert result["max_ulps_from_cpu"] == 0
    assert [r["equals_reference"] for r in result["results"]] == [True, True, None]
    assert [s["case"] for s in result["shaders"]] == [MOE.name, ROUTER.name]
    assert all(s["compile_seconds"] >= 0 for s in result["shaders"])


def test_metal_finds_which_contraction(monkeypatch, wrong_moe):
    monkeypatch.setattr(_ext, "moe_decode_obstacle", lambda *_: "")
    result = run_backend(OnThisCpu("metal", None), [MOE], quiet)
    assert result["contraction_found"] == "neither"
    assert result["results"][0]["failures"] == [
        "differs from the reference",
        "matches no golden digest",
    ]
    found = result["results"][0]["digest"]
    monkeypatch.setattr(compare, "golden", lambda: {MOE.name: {"on": "0", "off": found}})
    result = run_backend(OnThisCpu("metal", None), [MOE], quiet)
    assert result["contraction_found"] == "off"


def test_a_metal_kernel_that_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr(_ext, "moe_decode_obstacle", lambda *_: "too many tokens")
    result = run_backend(OnThisCpu("metal", None), [MOE], quiet)
    assert result["results"][0]["error"] == "too many tokens"
    assert result["failed"] == 1


def test_simulator_is_held_to_the_digests_of_its_mode(monkeypatch):
    launch = types.SimpleNamespace(kernel="moe_gate_up")
    fake = types.SimpleNamespace(
        unavailable=lambda: "",
        simulated=lambda contract: contextlib.nullcontext(),
        take_launches=lambda: [launch],
    )
    monkeypatch.setattr(backends, "metal_sim", fake)
    chosen, _ = backends.chosen("metal-sim")
    on, off = (run_backend(b, FEW, quiet) for b in chosen)
    assert (on["cases"], on["failed"], on["contraction_requested"]) == (2, 0, True)
    assert on["shaders"][0]["kernels"] == ["moe_gate_up"]
    # The CPU contracts: what it computes is wrong without contraction.
    assert (off["cases"], off["failed"], off["contraction_requested"]) == (2, 2, False)
    assert off["results"][0]["failures"] == ["does not match its golden digest (found: on)"]


@pytest.mark.parametrize("backend", [backends.METAL, *backends.SIMULATED], ids=lambda b: b.title)
def test_gpu_kernels(backend):
    try:
        backends.chosen(backend.name)
    except ValueError as error:
        pytest.skip(str(error))
    result = run_backend(backend, [MOE, ROUTER], quiet)
    assert result["failed"] == 0, result
    if backend.contract is not None:
        assert result["contraction_found"] == ("on" if backend.contract else "off")
        assert result["shaders"][0]["kernels"][1].startswith("glm_fused_moe_down_sum")


@pytest.mark.slow
def test_simulator(capsys):
    if reason := metal_sim.unavailable():
        pytest.skip(reason)
    assert main(["selftest", "--backend", "metal-sim", "--quick"]) == 0
    count = sum(case.has_metal_kernel for case in cases(quick=True))
    assert capsys.readouterr().out.count(f" {count} of {count} cases passed") == 2


def test_no_simulator(monkeypatch):
    fake = types.SimpleNamespace(unavailable=lambda: "no zig in /opt/x")
    monkeypatch.setattr(backends, "metal_sim", fake)
    with pytest.raises(ValueError, match="metal-sim is not usable: no zig"):
        backends.chosen("metal-sim")
    chosen, absent = backends.chosen("all-available")
    assert backends.CPU in chosen
    assert absent["metal-sim"] == "no zig in /opt/x"


def test_first_difference():
    a = [np.array([1, 2], np.int32), np.array([[0x3F80, 0x8000]], np.uint16)]
    b = [np.array([1, 2], np.int32), np.array([[0x3F80, 0x0001]], np.uint16)]
    assert compare.first_difference(a, a) is None
    found = compare.first_difference(a, b)
    assert found == {"output": 1, "count": 1, "of": 2, "index": [0, 1], "bits": ["0x8000", "0x1"]}
    assert "shapes" in compare.first_difference(a[:1], [np.array([1], np.int32)])


def test_ulps_are_of_the_largest_value():
    expected = [np.array([0x3F80, 0x0001], np.uint16)]  # in bfloat16 these are 1 and almost 0
    found = [np.array([0x3F81, 0x3C00], np.uint16)]  # one ulp more, and an ulp of 1
    assert compare.ulps(expected, expected, mx.bfloat16) == 0
    assert compare.ulps(found, expected, mx.bfloat16) == pytest.approx(1)
    assert compare.ulps([np.uint32([0x40000001])], [np.uint32([0x40000000])], mx.bfloat16) == 1
    assert compare.ulps([np.uint16([0x7FC0])], [np.uint16([0x3F80])], mx.bfloat16) is None
    assert compare.ulps([np.int32([1])], [np.int32([9])], mx.bfloat16) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/Users/ann/a b.metal:3:1: error", "a b.metal:3:1: error"),
        ("in ~/x/y/z.h and /tmp/q", "in z.h and q"),
        ("3/4 of a/b, avx512", "3/4 of a/b, avx512"),
    ],
)
def test_paths_are_cut(text, expected):
    assert machine.without_paths(text) == expected


def test_a_mac_is_described(monkeypatch):
    printed = {
        "machdep.cpu.brand_string": "Apple M3 Max\n",
        "hw.perflevel0.physicalcpu": "12\n",
        "AGXAccelerator": '  | "gpu-core-count" = 40\n',
    }
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.Path, "exists", lambda _: False)
    monkeypatch.setattr(
        machine.subprocess,
        "run",
        lambda c, **_: types.SimpleNamespace(stdout=printed[c[-1]], returncode=0),
    )
    found = machine.machine()
    assert (found["chip"], found["performance_cores"], found["gpu_cores"]) == (
        "Apple M3 Max",
        12,
        40,
    )


def test_benchmarks(monkeypatch):
    def small(fmt):
        return original(fmt, hidden=512, intermediate=256, bank=8, top_k=2)

    original = microbench.RoutedExperts
    monkeypatch.setattr(microbench, "RoutedExperts", small)
    monkeypatch.setattr(microbench, "YARDSTICK_BYTES", 1 << 20)
    found = microbench.run_benchmarks([backends.CPU], True, quiet)
    assert [row["format"] for row in found["rows"]] == ["affine4", "mxfp4", "bf16"]
    for row in found["rows"]:
        assert row["gb_per_s"] > 0
        assert row["fraction"] > 0
        assert (row["times_faster_than_stock"] is None) == (row["format"] == "bf16")


def test_mxfp8_is_measured_with_codes_of_quantized_weights():
    layer = benchmark.RoutedExperts(FORMATS["mxfp8"], hidden=512, intermediate=256, bank=4, top_k=2)
    for w in (layer.gate, layer.up, layer.down):
        magnitudes = to_numpy(w.planes[0]).view(np.uint8) & 0x7F
        assert (magnitudes < 8).mean() < 1e-3  # subnormal
        assert (magnitudes >= 0x70).mean() > 0.2  # near the largest code, 0x7e
        values = dequantize(w, mx.float32)
        assert 0.1 < mx.std(values).item() * values.shape[-1] ** 0.5 < 10


def test_bits_are_the_same_everywhere():
    """These values are those of PCG64 and integer arithmetic: golden digests rest on them."""
    bits = synthetic.Bits(1)
    assert bits.words(3).tolist() == [2032329983, 2198257139, 3243419750]
    floats = compare.evaluated([bits.floats((2, 2), d) for d in synthetic.DTYPES.values()])
    assert [a.ravel().tolist() for a in floats] == [
        [16333, 16118, 48978, 48686],
        [12969, 16288, 47176, 14149],
        [1072590116, 3211022643, 1070217930, 1052853836],
    ]


@pytest.mark.parametrize("fmt", [FORMATS[name] for name in ("affine4", "mxfp8", "nvfp4", "bf16")])
def test_weights_are_sane(fmt):
    bits = synthetic.Bits(2)
    w = bits.weight((64, 512), fmt, mx.bfloat16)
    x = bits.floats((4, 512), mx.float32)
    y = ops.quantized_matvec(x, w)
    assert 0.1 < mx.sqrt((y * y).mean()).item() < 10


def test_names_tell_cases_apart():
    moe = MoeDecode("bfloat16", 1, AFFINE4, AFFINE4, None, 64, 64)
    router = RouterTopk("bfloat16", 1, "float32", 16, 64, 4)
    matvec = QuantizedMatvec("bfloat16", 1, AFFINE4, 8, 64)
    for case, changes in (
        (moe, {"tokens": 2, "down": AFFINE4, "hidden": 128, "bank": 4, "top_k": 1}),
        (router, {"experts": 17, "n_group": 2, "weight_dtype": "float16", "top_k": 5}),
        (matvec, {"fmt": None, "n": 9, "k": 128, "dtype": "float32"}),
    ):
        names = {replace(case, **{key: value}).name for key, value in changes.items()}
        assert len(names | {case.name}) == len(changes) + 1
