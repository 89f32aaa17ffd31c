"""``glm-fused doctor --hosts``: machines that share a model, links between them, and a forecast.

It starts itself on all hosts with `mlx.launch`, or is started so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import UsageError
from .output import print_json
from .sharding import CONTEXT, talking

if TYPE_CHECKING:
    import mlx.core as mx

    from ..checkpoint.folder import Checkpoint

_RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # where a launcher says it
_LOCAL = "127.0.0.1"  # which mlx.launch does not ask by ssh
_ANSWER = 10  # seconds
_PACKAGES = ("glm-fused", "mlx")


def check_hosts(options: argparse.Namespace) -> int:
    """Measure, or have it measured on the hosts that are named; returns the exit code."""
    if any(name in os.environ for name in _RANK):
        return _measure(options)
    if not options.hosts:
        raise UsageError("--hosts: expected addresses, or to be started by mlx.launch.")
    return _show(_launched(options), options.json)


def _show(found: dict[str, Any], as_json: bool) -> int:
    from ..measuring.links import format_links
    from ..measuring.placement import format_plans

    plan = found.get("plan")
    if as_json:
        print_json(found)
    else:
        of_model = [] if plan is None else [found["model"], *format_plans(plan)]
        print("\n".join([*format_links(found["ranks"], found), *of_model]))
    return 0 if plan is None or plan["fits"] else 1


def _measure(options: argparse.Namespace) -> int:
    """Measure as one of several ranks, which end together; rank 0 shows what they found."""
    from .. import set_num_threads
    from ..measuring.fit import memory_rate
    from ..measuring.links import measure_links
    from ..memory import machine_bytes
    from ..parallel.agreement import agree, join_group, tell
    from ..parallel.interrupts import on_interrupt
    from ..parallel.watch import Watch

    if options.threads is not None:
        set_num_threads(options.threads)
    group = join_group()
    with talking(group.rank()), Watch(group) as watch, on_interrupt(watch.interrupt):
        agree(group, {f"the version of {name}": metadata.version(name) for name in _PACKAGES})
        rate = memory_rate() / 1e9
        here = {"host": socket.gethostname(), "memory": machine_bytes(), "read_gb_per_s": rate}
        ranks = [json.loads(text) for text in tell(group, json.dumps(here))]
        found = {"ranks": ranks} | measure_links(group, _gathered(options, group))
        if options.model is not None and group.rank() == 0:
            found |= {"model": options.model, "plan": _forecast(options, found)}
        return _show(found, options.json)


def _gathered(options: argparse.Namespace, group: mx.distributed.Group) -> dict[str, int]:
    """The gathers of a layer of the model, which rank 0 reads, or of GLM-5.2."""
    from ..measuring.cluster import gathers_of
    from ..measuring.links import GATHERED
    from ..parallel.agreement import tell

    if options.model is None:
        return GATHERED
    found = gathers_of(_checkpoint(options)) if group.rank() == 0 else {}
    gathers: dict[str, int] = json.loads(tell(group, json.dumps(found))[0])
    return gathers


def _forecast(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """What `plan_shards` gives of the model with what was measured."""
    from ..measuring.cluster import Link, Machine
    from ..measuring.placement import plan_shards

    rates = [(rank["memory"], round(1e9 * rank["read_gb_per_s"])) for rank in found["ranks"]]
    machines = [Machine(memory, rate) for memory, rate in rates]
    return plan_shards(_checkpoint(options), machines, Link(**found["link"]), CONTEXT, "auto")


def _checkpoint(options: argparse.Namespace) -> Checkpoint:
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub import local_model

    return Checkpoint.open(local_model(options.model))


def _launched(options: argparse.Namespace) -> dict[str, Any]:
    """Have ranks on all hosts measure; returns what rank 0 found."""
    hosts = [host.strip() for host in options.hosts.split(",")]
    if len(hosts) < 2 or not all(hosts):
        raise UsageError("--hosts: expected two addresses or more, with commas between them.")
    for host in dict.fromkeys(hosts):
        if host != _LOCAL:
            _ask(host)
    command = [_launcher(), "--hosts", ",".join(hosts), "--starting-port", str(_free_port())]
    command += ["--", sys.executable, "-m", "glm_fused", "doctor", "--hosts", "--json"]
    for name in ("model", "threads"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", str(value)]
    stdin, writer = os.pipe()  # at whose end mlx.launch would read on and on, on a processor
    try:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True)
    finally:
        os.close(stdin)
        os.close(writer)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.splitlines()
        said = [line for line in lines if "error: " in line] or lines
        why = said[0].partition("error: ")[2] or said[0] if said else "they said nothing"
        raise RuntimeError(f"[doctor] the hosts measured nothing: {why}") from None
    return found


def _ask(host: str) -> None:
    """Raise RuntimeError for a host that does not answer, or where this Python is not."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER}", host]
    asked = subprocess.run(
        [*ssh, "test", "-x", sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if asked.returncode == 1:
        raise RuntimeError(f"[doctor] {host} has no {sys.executable}, which runs glm-fused here.")
    if asked.returncode:
        why = " ".join(asked.stderr.split()) or f"ssh exits with {asked.returncode}"
        raise RuntimeError(f"[doctor] {host} does not answer: {why}")


def _launcher() -> str:
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mlx.launch", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError("mlx.launch is not installed; it comes with mlx.")
    return found


def _free_port() -> int:
    """A port from which on ranks may listen; on other hosts it is as likely free as any."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port
