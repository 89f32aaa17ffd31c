"""`python -m tests.counts`: compare counts with those recorded, or record them."""

import argparse
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from . import (
    count_instructions,
    cpu,
    instruction_drift,
    launch_drift,
    metal,
    read,
    tolerance,
    write,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.counts", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write cpu.json and metal.json")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as folder:
        instructions = count_instructions(cpu.build_counter(Path(folder)))
    launches = metal.recorded()
    recorded = read("cpu")
    if options.record:
        for name in cpu.SETS.keys() - instructions.keys():
            print(f"{name} stays as it is: this processor does not have it", file=sys.stderr)
        write("cpu", recorded | {"compiler": cpu.compiler()} | instructions)
        write("metal", launches)
        return 0
    lines = [
        f"{kernels}: {line}"
        for kernels, counts in instructions.items()
        for line in instruction_drift(recorded[kernels], counts, tolerance(recorded))
    ]
    lines += launch_drift(read("metal"), launches)
    print("\n".join(lines or ["as recorded"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
