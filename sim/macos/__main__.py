"""python -m sim.macos: build the wheel for a Mac, check it, say what was checked."""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from . import build, check, mlx_wheels, providers
from .errors import MacOSBuildError


def build_and_check(to: Path) -> tuple[Path, Counter[str]]:
    """The wheel, and how many symbols its extension takes from each library."""
    mlx = mlx_wheels.fetch(build.pinned_mlx())
    wheel = build.build_wheel(mlx, to)
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        (extension,) = (n for n in archive.namelist() if n.endswith(".so"))
        return wheel, check.undefined_by_provider(Path(archive.extract(extension, scratch)), mlx)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sim.macos", description=__doc__)
    parser.add_argument("--to", type=Path, default=build.work_dir() / "wheel", metavar="FOLDER")
    try:
        wheel, counts = build_and_check(parser.parse_args().to)
    except MacOSBuildError as error:
        sys.exit(f"error: {error}")
    source = providers.describe()
    for provider, count in counts.most_common():
        print(f"{count:4} from {provider} ({source.get(provider, 'as used by MLX itself')})")
    print(f"{wheel}: links; never run on a Mac")


if __name__ == "__main__":
    main()
