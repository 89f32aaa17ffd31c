"""Runs a program as several ranks of a ring over this machine's loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

TESTS = Path(__file__).parent


def free_ports(count):
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start(commands, folder, **environment):
    """Start Python with each of the commands, as a rank with one thread; files in ``folder``."""
    hosts = Path(folder) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]))
    own = {
        "MLX_HOSTFILE": str(hosts),
        "GLM_FUSED_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS.parent),
    }
    shared = os.environ | own | environment
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=shared | {"MLX_RANK": str(rank)},
            cwd=TESTS,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank, command in enumerate(commands)
    ]


def finish(processes, timeout=300):
    """Wait for ranks; returns the exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def run(ranks, *command, folder, timeout=300):
    """Run one command as so many ranks; returns stdout of each. A rank that fails is an error."""
    outputs = finish(start([command] * ranks, folder), timeout)
    for rank, (code, _, errors) in enumerate(outputs):
        assert code == 0, f"rank {rank} exited with {code}:\n{errors}"
    return [out for _, out, _ in outputs]
