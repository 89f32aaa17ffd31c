"""Makes the golden digests of `glm-fused selftest`, on Linux, in some minutes:

    PYTHONPATH=. python tests/make_selftest_golden.py

Needs a build with -C cmake.define.GLM_FUSED_METAL_SIM=ON. With contraction: what the CPU computes,
which the simulated shaders must equal. Without: what the simulated shaders compute, or MLX's own
kernels for quantized_matvec.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import metal_kernels as mk
import mlx.core as mx
import numpy as np
import sim
from tqdm import tqdm

from glm_fused import metal_sim, selftest
from glm_fused.formats import Format
from glm_fused.selftest.case import Case
from glm_fused.selftest.cases import cases
from glm_fused.selftest.compare import GOLDEN, Outputs, digest, evaluated, first_difference
from glm_fused.selftest.expert_cases import MoeDecode, QuantizedMatvec, RouterTopk

TARGET = Path(selftest.__file__).parent / GOLDEN
DENSE = ("dense", 0, 0)


def plain(fmt: Format | None) -> mk.Format:
    return DENSE if fmt is None else (fmt.mode, fmt.bits, fmt.group_size)


def kernel_case(c: MoeDecode | QuantizedMatvec) -> mk.Case:
    if isinstance(c, QuantizedMatvec):
        fmt = plain(c.fmt)
        return mk.Case(c.dtype, fmt, fmt, DENSE, hidden=c.k, intermediate=c.n)
    formats = [plain(f) for f in (c.gate, c.up, c.down)]
    return mk.Case(c.dtype, *formats, c.tokens, c.top_k, c.hidden, c.intermediate, c.bank)


def as_bits(*arrays: np.ndarray) -> Outputs:
    unsigned = {"float32": np.uint32, "float16": np.uint16}
    return [a.view(unsigned.get(a.dtype.name, a.dtype)) for a in arrays]


class Simulator:
    """MLX's kernels and ours, compiled once for all cases."""

    def __init__(self, made: list[Case]) -> None:
        moe = [kernel_case(c) for c in made if isinstance(c, MoeDecode)]
        matvec = [kernel_case(c) for c in made if isinstance(c, QuantizedMatvec)]
        self.moe, self.matvec = mk.Libraries(moe), mk.Libraries(matvec)

    def run(self, case: Case, contract: bool) -> Outputs:
        if isinstance(case, MoeDecode):
            return self.run_moe(case, contract)
        if isinstance(case, RouterTopk):
            return run_router(case, contract)
        if isinstance(case, QuantizedMatvec):
            return self.run_matvec(case, contract)
        with metal_sim.simulated(contract=contract):
            return evaluated(case.call(case.arguments(), reference=False))

    def run_moe(self, case: MoeDecode, contract: bool) -> Outputs:
        a = case.arguments()
        weights = (a["gate"], a["up"], a["down"])
        slots, scores = np.array(a["slots"]), np.array(a["scores"])
        layer = mk.Layer(kernel_case(case), a["x"], *weights, slots, scores)
        return as_bits(mk.run_fused(self.moe.fused(case.dtype, contract, False), layer))

    def run_matvec(self, case: QuantizedMatvec, contract: bool) -> Outputs:
        a = case.arguments()
        w = a["w"]._replace(**{
            name: array[None]
            for name, array in zip(("weight", "scales", "biases"), a["w"][:3], strict=True)
            if array is not None
        })  # fmt: skip
        rows = np.arange(case.tokens, dtype=np.uint32)
        x, fmt = mk.to_numpy(a["x"]), plain(case.fmt)
        y = mk.gather_matvec(self.matvec, w, fmt, case.dtype, x, rows, 0 * rows, contract)
        return as_bits(y)


def run_router(case: RouterTopk, contract: bool) -> Outputs:
    a = case.arguments()
    types = ", ".join(mk.METAL_TYPES[t] for t in (case.dtype, case.weight_dtype))
    function = f"router_topk<{types}, {case.experts}, {case.n_group}>"
    text = mk.shader("router_topk") + mk.instance(function)
    chosen = np.full((case.tokens, case.top_k), -1, np.int32)
    shares = np.full(chosen.shape, np.nan, np.float32)
    counts = np.array([case.hidden, case.top_k, case.topk_group, True], np.int32).tobytes()
    factor = np.float32(a["routed_scaling_factor"]).tobytes()
    inputs = [mk.to_numpy(a[name]) for name in ("x", "weight", "correction_bias")]
    params = np.frombuffer(counts + factor, np.uint8).copy()
    sim.compile(text, contract=contract).run(
        mk.host_name(function),
        grid=(case.tokens, 1, 1),
        threadgroup=(32, 4, 1),
        buffers=dict(enumerate([*inputs, chosen, shares, params])),
    )
    return as_bits(chosen, shares)


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
    document = {"made by": "tests/make_selftest_golden.py", "digests": digests}
    TARGET.write_text(json.dumps(document, indent=0) + "\n", "utf-8")
    print(f"{len(digests)} cases in {TARGET.name}")


if __name__ == "__main__":
    main()
