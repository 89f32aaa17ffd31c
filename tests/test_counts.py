"""What kernels do has not drifted from what was recorded: instructions, launches and bytes."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from metal_backend import simulated_only
from tests import counts
from tests.counts import cpu, metal

from glm_fused.ops import metal_sim

RECORD = "\nif it is meant to be so: python -m tests.counts --record"
on_cpu = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "it can")
simulated = pytest.mark.skipif(
    bool(metal_sim.unavailable()), reason=metal_sim.unavailable() or "it can"
)
# Runs three instructions a round and one more.
LOOP = r"""
asm(".text\n.globl rounds\nrounds:\n"
    "1: nop\n dec %rdi\n jnz 1b\n ret\n"
    ".globl rounds_end\nrounds_end:\n");
"""


# The counter has all threads of its process trap; one that blocks signals just then, as threads of
# other tests might, would end it.
COUNT = """
import ctypes, sys, threading
counter, loop = map(ctypes.CDLL, sys.argv[1:])
counter.begin_counting.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
counter.end_counting.restype = ctypes.c_uint64
loop.rounds.argtypes = [ctypes.c_uint64]
code = (ctypes.cast(symbol, ctypes.c_void_p).value for symbol in (loop.rounds, loop.rounds_end))
go = threading.Event()
thread = threading.Thread(target=lambda: (go.wait(), loop.rounds(100)))
thread.start()
counter.begin_counting(*code)
go.set()
thread.join()
print(counter.end_counting())
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    return cpu.build_counter(tmp_path_factory.mktemp("counter"))


@pytest.fixture(scope="module")
def found(counter):
    return counts.count_instructions(counter)


@on_cpu
@pytest.mark.parametrize("kernels", cpu.SETS)
def test_instructions_of_the_hot_ops(kernels, found):
    recorded = counts.read("cpu")
    if kernels not in found:
        count = len(recorded[kernels])
        pytest.skip(f"this processor has no {kernels}: {count} counts are not compared")
    lines = counts.instruction_drift(recorded[kernels], found[kernels], counts.tolerance(recorded))
    assert not lines, "\n".join(lines) + RECORD


@on_cpu
def test_other_kernels_have_other_counts(counter):
    """Portable kernels in the place of those that were recorded are found out."""
    op = "rms_norm"
    recorded = {op: counts.read("cpu")["avx2"][op]}
    portable = cpu.count(counter, "portable", op)
    assert list(portable) == [op]
    assert len(counts.instruction_drift(recorded, portable, counts.OTHER_COMPILER)) == 1


@on_cpu
def test_the_counter_counts_every_instruction(counter, tmp_path):
    (tmp_path / "loop.cpp").write_text(LOOP)
    loop = cpu.build(tmp_path / "loop.cpp", tmp_path / "loop.so")
    command = [sys.executable, "-c", COUNT, str(counter), str(loop)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == 3 * 100 + 1


def test_drift_is_told_op_by_op():
    recorded = {"same": 100, "more": 1000, "fewer": 1000, "gone": 5}
    found = {"same": 102, "more": 1021, "fewer": 979, "new": 5}
    assert counts.instruction_drift(recorded, found, 0.02) == [
        "fewer: 1000 recorded, 979 counted (-2.1%)",
        "gone: 5 recorded, None counted",
        "more: 1000 recorded, 1021 counted (+2.1%)",
        "new: None recorded, 5 counted",
    ]


@pytest.fixture
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@simulated_only
@simulated
@pytest.mark.usefixtures("on_the_cpu")
def test_launches_and_bytes_of_the_stages():
    lines = counts.launch_drift(counts.read("metal"), metal.recorded())
    assert not lines, "\n".join(lines) + RECORD


@simulated_only
@simulated
@pytest.mark.usefixtures("on_the_cpu")
def test_other_tiles_have_other_counts(monkeypatch):
    """Tiles of half the rows read the vector more often, which is found out."""
    stage = "token, experts, bf16 rows"
    recorded = {stage: counts.read("metal")[stage]}
    monkeypatch.setenv("GLM_FUSED_METAL_TILES", "2,2,8,32")
    launches = metal.launches(metal.Layer(metal.SMALL).mlps())
    lines = counts.launch_drift(recorded, {stage: [*map(metal.counts, launches)]})
    assert any("requested" in line for line in lines), lines


def test_records_are_whole():
    recorded = counts.read("cpu")
    assert recorded.keys() == {"compiler", *cpu.SETS}
    assert recorded["avx512"].keys() == recorded["avx2"].keys()
    assert Path(counts.FOLDER / "metal.json").exists()
