"""Makes the golden digests of `glm-fused selftest`, on Linux, in some minutes:

    PYTHONPATH=. python tests/make_selftest_golden.py

It needs a build with -C cmake.define.GLM_FUSED_METAL_SIM=ON. With contraction it keeps what the CPU
computes, which the simulated shaders must equal; without, what the simulated shaders compute, or
MLX's own kernels for quantized_matvec.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import expert_layers as layers
import mlx.core as mx
import mlx_kernels as mk
import numpy as np
from tqdm import tqdm

from glm_fused import selftest
from glm_fused.formats.weights import Format
from glm_fused.ops import metal_sim
from glm_fused.selftest.case import Case
from glm_fused.selftest.cases import cases
from glm_fused.selftest.compare import GOLDEN, Outputs, digest, evaluated, first_difference
from glm_fused.selftest.expert_cases import QuantizedMatvec

TARGET = Path(selftest.__file__).parent / GOLDEN
DENSE = ("dense", 0, 0)


def plain(fmt: Format | None) -> layers.Format:
    return DENSE if fmt is None else (fmt.mode, fmt.bits, fmt.group_size)


def kernel_case(c: QuantizedMatvec) -> layers.Case:
    fmt = plain(c.fmt)
    return layers.Case(c.dtype, fmt, fmt, DENSE, hidden=c.k, intermediate=c.n)


def as_bits(*arrays: np.ndarray) -> Outputs:
    unsigned = {"float32": np.uint32, "float16": np.uint16}
    return [a.view(unsigned.get(a.dtype.name, a.dtype)) for a in arrays]


class Simulator:
    """MLX's kernels, compiled once for all cases, and ours."""

    def __init__(self, made: list[Case]) -> None:
        self.matvec = mk.Libraries([kernel_case(c) for c in made if isinstance(c, QuantizedMatvec)])

    def run(self, case: Case, contract: bool) -> Outputs:
        if isinstance(case, QuantizedMatvec):
            return self.run_matvec(case, contract)
        with metal_sim.simulated(contract=contract):
            return evaluated(case.call(case.arguments(), reference=False))

    def run_matvec(self, case: QuantizedMatvec, contract: bool) -> Outputs:
        a = case.arguments()
        w = a["w"]._replace(planes=[plane[None] for plane in a["w"].planes])
        rows = np.arange(case.tokens, dtype=np.uint32)
        x, fmt = layers.to_numpy(a["x"]), plain(case.fmt)
        y = mk.gather_matvec(self.matvec, w, fmt, case.dtype, x, rows, 0 * rows, contract)
        return as_bits(y)


def main() -> None:
    mx.set_default_device(mx.cpu)
    made, digests = cases(quick=False), {}
    simulator = Simulator(made)
    for case in tqdm(made, disable=not sys.stderr.isatty()):
        cpu = evaluated(case.call(case.arguments(), reference=False))
        for mode, expected in (
            ("the reference", evaluated(case.call(case.arguments(), reference=True))),
            ("the simulated shader", simulator.run(case, contract=True)),
        ):
            if difference := first_difference(cpu, expected):
                raise SystemExit(f"{case.name}: the CPU differs from {mode}: {difference}")
        off = simulator.run(case, contract=False)
        digests[case.name] = {"on": digest(cpu), "off": digest(off)}
        if case.seed != zlib.crc32(case.name.encode()):
            digests[case.name]["seed"] = case.seed
    document = {"made by": "tests/make_selftest_golden.py", "digests": digests}
    TARGET.write_text(json.dumps(document, indent=0) + "\n", "utf-8")
    print(f"{len(digests)} cases in {TARGET.name}")


if __name__ == "__main__":
    main()
