"""Where the cases run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..ops import metal_sim


@dataclass(frozen=True)
class Backend:
    """A place to run cases: "cpu", "metal" or "metal-sim".

    `contract` tells whether a*b+c is known to become an fma; None where the compiler decides.
    """

    name: str
    contract: bool | None

    @property
    def title(self) -> str:
        """The name, with the mode of a simulated backend."""
        if self.name != "metal-sim":
            return self.name
        return f"{self.name}, contraction {'on' if self.contract else 'off'}"

    @property
    def runs_kernels_on_gpu(self) -> bool:
        """Whether ops with Metal kernels run these, on a GPU or in the simulator."""
        return self.name != "cpu"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, ops that are evaluated run on this backend."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mx.stream(mx.gpu if self.name == "metal" else mx.cpu))
            if self.name == "metal-sim":
                stack.enter_context(metal_sim.simulated(contract=bool(self.contract)))
            yield

    def kernels_launched(self) -> list[str] | None:
        """Names of the kernels launched since the last call, where they can be told."""
        if self.name != "metal-sim":
            return None
        return [launch.kernel for launch in metal_sim.take_launches()]


CPU = Backend("cpu", True)
METAL = Backend("metal", None)
SIMULATED = (Backend("metal-sim", True), Backend("metal-sim", False))


def chosen(choice: str) -> tuple[list[Backend], dict[str, str]]:
    """The backends to run for a choice, and per unusable one the reason.

    Raises ValueError where a backend asked for by name is not usable.
    """
    reasons = {"cpu": "", "metal": _no_metal(), "metal-sim": _no_simulator()}
    if reasons.get(choice):
        raise ValueError(f"backend {choice} is not usable: {reasons[choice]}")
    names = [n for n, why in reasons.items() if not why] if choice == "all-available" else [choice]
    backends = [b for b in (CPU, METAL, *SIMULATED) if b.name in names]
    return backends, {n: why for n, why in reasons.items() if why}


def _no_metal() -> str:
    return "" if mx.metal.is_available() else "MLX finds no Metal device"


def _no_simulator() -> str:
    return metal_sim.unavailable()
