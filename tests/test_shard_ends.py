"""How ranks end: when one dies, hangs or is interrupted, and when their launcher dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ring

GENERATE = ["generate", "--model", "demo", "--raw", "--shard", "tensor", "--seed", "1"]
LONG = [*GENERATE, "--temp", "1", "--max-tokens", "4000", "--prompt", "def main():"]
BIN = Path(sys.executable).parent
# A rank that says on stderr that it has met the others.
MEET = """
import sys
from glm_fused.cli import main
from glm_fused.parallel.watch import Watch
enter = Watch.__enter__
def said(self):
    enter(self)
    print("met", file=sys.stderr, flush=True)
    return self
Watch.__enter__ = said
sys.exit(main(sys.argv[1:]))
"""


def ended(processes, seconds):
    """What each process wrote to stderr and its exit code, once all have ended in time."""
    end, found = time.monotonic() + seconds, []
    for process in processes:
        _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
        found.append((process.returncode, errors))
    return found


@contextlib.contextmanager
def started(count, folder, *command):
    """Ranks that have met, in a process group for each."""
    ranks = ring.start([["-c", MEET, *command]] * count, folder)
    try:
        for rank in ranks:
            assert rank.stderr.readline() == "met\n"
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@contextlib.contextmanager
def launched(count, *command):
    """``mlx.launch`` in a session of its own, and the processes of its ranks."""
    port = ring.free_ports(1)[0]
    launch = [BIN / "mlx.launch", "-n", str(count), "--starting-port", str(port), "--"]
    launcher = subprocess.Popen(
        [*launch, sys.executable, "-c", MEET, *command],
        start_new_session=True,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"GLM_FUSED_NUM_THREADS": "1"},
    )
    try:
        assert [launcher.stderr.readline() for _ in range(count)] == ["met\n"] * count
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        tasks = children.parent.parent.glob("*/children")
        ranks = [int(pid) for task in tasks for pid in task.read_text().split()]
        assert len(ranks) == count
        yield launcher, ranks, range(port, port + count)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()


def alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(pids, seconds=10):
    """Whether all of these processes are gone within so many seconds."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def listens(port):
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.parametrize(
    ("shard", "how", "says"),
    [
        ("tensor", signal.SIGKILL, "[shard] rank 1 is gone."),
        ("tensor", signal.SIGSTOP, "[shard] rank 1 has not answered for 5 s."),
        ("pipeline", signal.SIGKILL, "[shard] rank 1 is gone."),
        pytest.param(
            "pipeline",
            signal.SIGSTOP,
            "[shard] rank 1 has not answered for 5 s.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_end_when_a_rank_does_not_go_on(tmp_path, shard, how, says):
    with started(3, tmp_path, *LONG, "--shard", shard) as ranks:
        ranks[0].stdout.read(1)
        ranks[1].send_signal(how)
        for code, errors in ended([ranks[0], ranks[2]], 60):
            assert code == 2
            assert f"glm-fused: error: {says}\n" in errors


@pytest.mark.parametrize("writes", [False, True])
def test_ctrl_c_ends_all_without_a_word(tmp_path, writes):
    with started(2, tmp_path, *LONG) as ranks:
        if writes:
            ranks[0].stdout.read(1)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        for code, errors in ended(ranks, 30):
            assert code == 130
            assert "glm-fused" not in errors and "Traceback" not in errors


def test_a_rank_that_is_interrupted_ends_all(tmp_path):
    with started(2, tmp_path, *LONG) as ranks:
        ranks[0].stdout.read(1)
        ranks[1].send_signal(signal.SIGINT)
        (code, errors), (code_1, errors_1) = ended(ranks, 30)
    assert (code, code_1) == (2, 130)
    assert "glm-fused: error: [shard] rank 1 was interrupted.\n" in errors
    assert "Traceback" not in errors + errors_1


def test_ctrl_c_while_another_rank_hangs(tmp_path):
    """MLX waits for it; Python sees the signal only afterwards."""
    with started(2, tmp_path, *LONG) as ranks:
        ranks[0].stdout.read(1)
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # now rank 0 waits for it
        began = time.monotonic()
        ranks[0].send_signal(signal.SIGINT)
        ((code, errors),) = ended([ranks[0]], 30)
        assert time.monotonic() - began < 5  # before the other one is taken to hang
    assert code == 130
    assert "glm-fused" not in errors and "Traceback" not in errors


def test_ctrl_c_while_waiting_for_others(tmp_path):
    command = ["-m", "glm_fused", *LONG]
    rank, other = ring.start([command, ["-c", ""]], tmp_path, MLX_RING_VERBOSE="1")
    try:
        other.wait()
        assert rank.stderr.readline().startswith("[ring]")
        rank.send_signal(signal.SIGINT)
        ((code, errors),) = ended([rank], 30)
    finally:
        rank.kill()
    assert (code, "Traceback" in errors) == (-signal.SIGINT, False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_launcher_that_ends_leaves_no_process_and_no_port(how):
    """SIGINT goes to all, as a terminal sends it; a kill to the launcher alone.

    With --json a rank writes nothing before its end, so that no broken pipe ends it.
    """
    with launched(2, *LONG, "--json") as (launcher, ranks, ports):
        assert listens(ports[0]) or all(map(alive, ranks))
        if how == signal.SIGINT:
            os.killpg(launcher.pid, how)
        else:
            launcher.kill()
        assert gone(ranks)
        _, errors = launcher.communicate(timeout=30)
        assert not any(map(listens, ports))
    assert "glm_fused/" not in errors  # a trace-back that is ours


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_twenty_random_moments(tmp_path, rng, how):
    """The others end within 10 s, each with one error: in loading, in the prompt, in decoding."""
    prompt = "def main():\n    return 1\n" * 400
    longest = 0.0
    for number in range(20):
        folder = tmp_path / f"{how.name}{number}"
        folder.mkdir()
        with started(3, folder, *GENERATE, "--max-tokens", "3000", "--prompt", prompt) as ranks:
            moment, victim = rng.uniform(0, 12), rng.randrange(3)
            time.sleep(moment)
            others = [rank for i, rank in enumerate(ranks) if i != victim]
            assert all(rank.poll() is None for rank in ranks)
            ranks[victim].send_signal(how)
            began = time.monotonic()
            outcome = ended(others, 60)
            took = time.monotonic() - began
        longest = max(longest, took)
        print(f"{how.name} of rank {victim} after {moment:.1f} s: the others ended in {took:.1f} s")
        for code, errors in outcome:
            said = [line for line in errors.splitlines() if line.startswith("glm-fused")]
            assert code == 2
            assert len(said) == 1 and f"[shard] rank {victim} " in said[0], errors
        assert took < 10
    print(f"at most {longest:.1f} s")
