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


def start(ranks, program, *args, folder, **environment):
    """Start ``python program args`` as so many ranks, with one thread each; files in ``folder``."""
    hosts = Path(folder) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    shared = os.environ | {"MLX_HOSTFILE": str(hosts), "GLM_FUSED_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(program), *map(str, args)]
    return [
        subprocess.Popen(
            command,
            env=shared | {"MLX_RANK": str(rank)},
            cwd=TESTS,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


def run(ranks, program, *args, folder, timeout=300, **environment):
    """`start`, then wait; returns each rank's stdout. What a failed rank printed is the error."""
    processes = start(ranks, program, *args, folder=folder, **environment)
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} exited with {process.returncode}:\n{errors}"
    return [out for out, _ in outputs]
