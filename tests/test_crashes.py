"""Bad sizes, lack of threads and memory, exits and interrupts must not crash the process."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time

import mlx.core as mx
import psutil
import pytest
from test_slots import BYTES, CORE, EXPERTS, ROOT, build, file, make_bank  # noqa: F401

from glm_fused import _ext

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and exits as Linux has them")


def program(code, *arguments, env=None, timeout=120):
    """Run a Python program; returns what subprocess gives."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (env or {}),
    )


def test_sizes_that_no_kernel_takes_are_refused_when_the_graph_is_built():
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "op_bounds.py"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-300:] + result.stderr
    assert result.stdout.count("fine") > 100 and result.stdout.count("refused") > 500


def test_a_weight_without_columns_and_tokens_without_experts():
    """Both once divided by zero."""
    from glm_fused import ops

    empty = ops.Weight.dense(mx.zeros((8, 0)))
    with pytest.raises(ValueError, match="w must have at least one column but has 0"):
        ops.quantized_matvec(mx.zeros((1, 0)), empty)
    w = ops.Weight.dense(mx.zeros((2, 64, 64)))
    nobody, x = mx.zeros((1, 0), mx.int32), mx.zeros((1, 64))
    with pytest.raises(ValueError, match="at least one expert for each token"):
        ops.moe_decode(x, w, w, w, nobody, mx.zeros((1, 0)))
    with pytest.raises(ValueError, match="must have at least one slot"):
        none = ops.Weight.dense(mx.zeros((0, 64, 64)))
        ops.moe_decode(x, none, none, none, mx.zeros((1, 2), mx.int32), mx.zeros((1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 4, "spares": -1}, "spares must not be negative"),
        ({"slots": 4, "policy": "pinned", "pins": [16]}, "expert 16 cannot be pinned"),
        ({"slots": 4, "policy": "pinned", "pins": [-1]}, "expert -1 cannot be pinned"),
        ({"slots": 4, "patience": float("nan")}, "patience must be 0 to 1e9 seconds"),
        ({"slots": 4, "patience": 1e300}, "patience must be 0 to 1e9 seconds"),
        ({"slots": 4, "checksums": [1, 2]}, "2 checksums are not one for each of 16 experts"),
    ],
)
def test_banks_that_cannot_be(file, change, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make_bank(file, **change)


def test_parts_of_experts_that_cannot_be(file):  # noqa: F811
    files = _ext.SlotFiles([str(file)], [file.stat().st_size], False)
    reader = _ext.SlotReader(1, 4096)
    for shape in ([0], [-5], [2**31 - 1] * 3):
        part = [(shape, mx.uint8)]
        with pytest.raises(ValueError, match="cannot be given memory"):
            _ext.slot_bank(reader, files, 7, part, [(0, 0)] * 4, [], 2, 0, "lru", [], 1.0)
    with pytest.raises(ValueError, match="1 files have 2 sizes"):
        _ext.SlotFiles([str(file)], [1, 2], False)
    with pytest.raises(ValueError, match="1 to 65536 experts"):
        _ext.slots_simulate("lru", 10**9, 4, [], [])


THREADS = """
import resource, sys
import mlx.core as mx
import psutil
from glm_fused import _ext, num_threads, set_num_threads
mx.eval(mx.ones(3) + 1)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
room = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (held + room, resource.RLIM_INFINITY))
set_num_threads(64)
assert 1 <= num_threads() < 64
assert _ext.multiply_adds(1000) > 0
try:
    reader = _ext.SlotReader(200, 4096)
except RuntimeError as error:
    assert "no thread could be created" in str(error)
print("fine")
"""


@linux
@pytest.mark.parametrize("room", [2, 60])
def test_pools_run_on_the_threads_that_there_are(room):
    result = program(THREADS, room)
    assert result.stdout == "fine\n", result.stderr
    assert "of 63 threads for the CPU kernels could be created" in result.stderr
    assert "of 200 threads for reads could be created" in result.stderr


@linux
def test_what_a_task_throws_reaches_the_caller(tmp_path):
    runtime = ROOT / "csrc" / "cpu" / "runtime"
    sources = [runtime / f"{name}.cpp" for name in ("pool", "thread_pool")]
    stress = ROOT / "tests" / "cpp" / "pool_stress.cpp"
    pool = build(tmp_path, "pool", "-I", ROOT / "csrc", "-pthread", stress, *sources)
    result = subprocess.run([pool], capture_output=True, text=True, timeout=60)
    assert result.stdout == "fine\n", result.stderr


@linux
def test_no_slot_loads_for_ever_where_memory_runs_out(tmp_path):
    sources = [ROOT / "csrc" / "slots" / f"{name}.cpp" for name in CORE]
    sweep = ROOT / "tests" / "cpp" / "slots_memory.cpp"
    memory = build(tmp_path, "memory", "-O0", "-I", ROOT / "csrc", "-pthread", sweep, *sources)
    data = tmp_path / "experts.bin"
    data.write_bytes(b"".join(bytes([e]) * sum(BYTES) for e in range(EXPERTS)))
    for policy in ("learned", "lru", "s3fifo", "pinned"):
        result = subprocess.run([memory, data, policy], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) > 50


ENDING = """
import sys, threading
import mlx.core as mx
import psutil
from glm_fused import generate, load
decoding = threading.Event()
def decode():
    model, tokenizer = load("demo")
    prompt = tokenizer.encode("def f(x):")
    generate(model, tokenizer, prompt, max_tokens=8000, on_text=lambda text: decoding.set())
threading.Thread(target=decode, daemon=True).start()
assert decoding.wait(100)
sys.exit(7)
"""


@linux
@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_exit_code_stands_though_a_daemon_thread_decodes(threads):
    result = program(ENDING, env={"GLM_FUSED_NUM_THREADS": threads})
    assert (result.returncode, result.stderr) == (7, "")


def unread(pipe):
    """How many bytes of a pipe nobody has read yet."""
    count = struct.pack("i", 0)
    return struct.unpack("i", fcntl.ioctl(pipe.fileno(), termios.FIONREAD, count))[0]


@linux
@pytest.mark.parametrize("prompt", ["def f(x):", "word " * 4050], ids=["decode", "prompt"])
def test_ctrl_c_ends_a_run_without_a_traceback(prompt):
    from glm_fused.checkpoint.paths import bundled_folder

    command = [sys.executable, "-m", "glm_fused", "generate", "--model"]
    tokens = "7000" if len(prompt) < 100 else "7"
    command += [str(bundled_folder()), "--raw", "--max-tokens", tokens, "--prompt", "-"]
    run = subprocess.Popen(
        command,
        stdin=-1,
        stdout=-1,
        stderr=-1,
        text=True,
        env=os.environ | {"GLM_FUSED_NUM_THREADS": "1"},  # the prompt takes some seconds
        # What a shell runs in the background ignores the signal, and its children do too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    run.stdin.write(prompt)
    run.stdin.flush()
    while unread(run.stdin):  # it is still being imported
        time.sleep(0.01)
    run.stdin.close()
    if len(prompt) < 100:
        run.stdout.read(5)  # it decodes
    else:
        used = psutil.Process(run.pid).cpu_times
        begun = sum(used()[:2])
        while sum(used()[:2]) < begun + 2:  # it has loaded the model
            time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert "Traceback" not in run.stderr.read()
