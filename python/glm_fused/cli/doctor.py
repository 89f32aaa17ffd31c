"""``glm-fused doctor``: check the installation and this machine, or what a model would do here."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments
from .hosts import check_hosts
from .output import print_json

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub_names import HubName

HELP = "check the installation, or whether and how a model runs here"
EXAMPLES = """\
examples:
  glm-fused doctor
  glm-fused doctor --hosts ADDRESS1,ADDRESS2 --model PATH
  glm-fused doctor --model ORG/NAME               # before a download: headers alone are fetched
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = f"say whether and how it runs here, and how fast: {arguments.MODEL}"
    parser.add_argument("--model", type=arguments.path, metavar="PATH", help=help)
    help = (
        "check machines that share a model, the links between them and, with --model, how fast"
        "\nit can be there: on these addresses, or on those that mlx.launch has started it on"
    )
    parser.add_argument("--hosts", nargs="?", const="", metavar="A,B", help=help)
    arguments.add_threads(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..selftest import doctor

    if options.hosts is not None:
        return check_hosts(options)
    if options.model is not None:
        return _model(options)
    result = doctor.examine(options.threads)
    if options.json:
        print_json(result)
    else:
        print(doctor.format_result(result))
    return 0 if result["ok"] else 1


def _model(options: argparse.Namespace) -> int:
    from .. import set_num_threads
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub import Unreachable, local_model
    from ..checkpoint.hub_names import hub_name
    from ..measuring.disk import read_rate

    if options.threads is not None:
        set_num_threads(options.threads)
    if (name := hub_name(options.model)) is not None:
        with contextlib.suppress(Unreachable):  # then what is in its cache has to serve
            return _of_hub(name, options)
    checkpoint = Checkpoint.open(local_model(options.model))

    def disk_rate() -> float:
        largest = max(checkpoint.files, key=lambda file: checkpoint.files[file])
        return read_rate(checkpoint.folder / largest)

    return _print({"model": options.model}, checkpoint, disk_rate, options.json)


def _of_hub(name: HubName, options: argparse.Namespace) -> int:
    """The same of a model of the Hub, and whether the disk has room for it."""
    from huggingface_hub import hf_hub_download

    from ..checkpoint import hub
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub_files import files_of
    from ..checkpoint.hub_headers import write_headers
    from ..measuring.disk import folder_rate

    commit, files = hub.ask(name)
    cache = hub.cache_folder()
    with tempfile.TemporaryDirectory() as folder:
        with hub.explained(name):
            chosen = files_of(
                name,
                files,
                lambda file: Path(hf_hub_download(name.repository, file, revision=commit)),
            )
        nbytes, left = sum(chosen.values()), hub.to_download(name, commit, chosen)
        about = {
            "model": str(name),
            "commit": commit,
            "download": {"bytes": nbytes, "left": left, "free": hub.free_bytes(cache)},
        }
        headers = write_headers(name, commit, chosen, Path(folder))
        checkpoint = Checkpoint.open(headers)
        return _print(about, checkpoint, lambda: folder_rate(cache), options.json)


def _print(
    about: dict[str, Any], checkpoint: Checkpoint, disk_rate: Callable[[], float], as_json: bool
) -> int:
    """Print how the model runs; returns the exit code, which is 1 for one that cannot."""
    from ..measuring.fit import NOT, fit, format_fit, memory_rate
    from ..memory import size

    found = about | fit(checkpoint, memory_rate, disk_rate)
    download = found.get("download")
    room = download is None or download["left"] <= download["free"]
    ok = found["runs"] != NOT and room
    if as_json:
        print_json({"ok": ok} | found)
        return 0 if ok else 1
    print(found["model"] + (f" at {found['commit'][:12]}" if "commit" in found else ""))
    if download is not None:
        short = "" if room else ": too few"
        print(
            f"  download    {size(download['left'])} of {size(download['bytes'])}, and"
            f" {size(download['free'])} free{short}"
        )
    print("\n".join(format_fit(found)))
    return 0 if ok else 1
