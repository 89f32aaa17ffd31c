"""Rotary embedding as transformers computes it: float32 angles, default and YaRN frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .. import validation as check

DEFAULT_THETA = 10000.0
LEAST = 1e-20  # the least that a factor may be; far smaller ones are 0 in float32
PAGE = 256  # how many positions' angles are made together
ROWS_PAGE = 64  # the same of each row where rows have padding
LEAST_TURNS = 1e-6  # keeps positions / turns, whose logarithm is taken, finite


@dataclass(frozen=True)
class RopeParameters:
    """The resolved ``rope_parameters`` (or ``rope_theta`` + ``rope_scaling``) of a config."""

    theta: float = DEFAULT_THETA
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def from_config(
        cls, parameters: Any, theta: Any, scaling: Any, max_positions: int
    ) -> "RopeParameters":
        """Read either spelling; ``rope_parameters`` wins over ``rope_scaling``."""
        key = "rope_scaling" if parameters is None else "rope_parameters"
        values = scaling if parameters is None else parameters
        values = check.mapping(key, {} if values is None else values)
        rope_type = _rope_type(key, values)
        if values.get("rope_theta") is not None:
            theta_key, theta = f"{key}.rope_theta", values["rope_theta"]
        else:
            theta_key, theta = "rope_theta", DEFAULT_THETA if theta is None else theta
        theta = check.number(theta_key, theta, 1.0 + 1e-6, 1e12)
        if rope_type == "default":
            return cls(theta=theta)
        return cls(theta=theta, rope_type=rope_type, **_yarn_values(key, values, max_positions))

    def inv_freq(self, dim: int) -> npt.NDArray[np.float32]:
        """The inverse frequencies, float32 [dim / 2]."""
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        # torch's float32 pow is correctly rounded where numpy's is off by an ulp, and an ulp
        # here is 0.06 rad at position 10^6: so raise in float64 and round once.
        powers = np.power(np.float64(self.theta), exponent.astype(np.float64)).astype(np.float32)
        extrapolated = np.float32(1) / powers
        if self.rope_type == "default":
            return extrapolated
        interpolated = np.float32(1) / (np.float32(self.factor) * powers)
        low, high = self._correction_range(dim)
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
        blend: npt.NDArray[np.float32] = interpolated * (np.float32(1) - keep) + extrapolated * keep
        return blend

    def _correction_range(self, dim: int) -> tuple[float, float]:
        def dimension(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return (dim * math.log(turns)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if low == high else high

    @property
    def attention_scaling(self) -> float:
        """The factor of cos and sin."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    def softmax_scale(self, head_dim: int) -> float:
        """The factor of attention scores, in which YaRN's ``mscale_all_dim`` acts squared."""
        scale: float = head_dim**-0.5
        if self.rope_type != "default" and self.mscale_all_dim:
            scale *= _mscale(self.factor, self.mscale_all_dim) ** 2
        return scale


def _rope_type(key: str, values: Mapping[str, Any]) -> str:
    spelling = "rope_type" if values.get("rope_type") is not None else "type"
    value = values.get(spelling)
    return check.choice(f"{key}.{spelling}", "default" if value is None else value, *ROPE_TYPES)


ROPE_TYPES = ("default", "yarn")


def _yarn_values(key: str, values: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    def value(name: str, default: Any) -> Any:
        found = values.get(name)
        return default if found is None else found

    def name(leaf: str) -> str:
        return f"{key}.{leaf}"

    original = value("original_max_position_embeddings", max_positions)
    original = check.integer(name("original_max_position_embeddings"), original)
    factor = value("factor", max(max_positions / original, 1.0))
    attention_factor = value("attention_factor", None)
    if attention_factor is not None:
        attention_factor = check.number(name("attention_factor"), attention_factor, LEAST, 1e6)

    def turns(leaf: str, default: float) -> float:
        if check.number(name(leaf), value(leaf, 0), 0, 1e6) == 0:
            return default  # as in transformers
        return check.number(name(leaf), value(leaf, 0), LEAST_TURNS, 1e6)

    return {
        "original_max_position_embeddings": original,
        "factor": check.number(name("factor"), factor, 1.0, 1e6),
        "attention_factor": attention_factor,
        "beta_fast": turns("beta_fast", 32.0),
        "beta_slow": turns("beta_slow", 1.0),
        "mscale": check.number(name("mscale"), value("mscale", 0), 0, 1e6),
        "mscale_all_dim": check.number(name("mscale_all_dim"), value("mscale_all_dim", 0), 0, 1e6),
        "truncate": check.boolean(name("truncate"), value("truncate", True)),
    }


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class Angles(NamedTuple):
    """Float32 cos and sin, [b or 1, 1, l, dim / 2], shared by all layers of a forward."""

    cos: mx.array
    sin: mx.array


class Page(NamedTuple):
    """The angles of successive positions, from ``first`` on."""

    first: int
    angles: Angles

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.first + self.angles.cos.shape[2]

    def of_span(self, first: int, length: int) -> Angles:
        """The angles at positions ``first`` to ``first + length - 1``, which it has."""
        if (first, first + length) == (self.first, self.end):
            return self.angles
        at = slice(first - self.first, first - self.first + length)
        return Angles(self.angles.cos[:, :, at], self.angles.sin[:, :, at])


class Rope:
    """Makes rotary angles for a rope width of ``dim``."""

    def __init__(self, parameters: RopeParameters, dim: int):
        self.inv_freq = mx.array(parameters.inv_freq(dim))
        self.scaling = parameters.attention_scaling
        self._page: Page | None = None

    def page_of_span(self, first: int, length: int) -> Page:
        """The angles, as `angles` gives them, of a page that has the span; it is made once.

        A span that lies in two pages gets a page of its own.
        """
        begin = first // PAGE * PAGE
        if first + length > begin + PAGE:
            return Page(first, self.angles(mx.arange(first, first + length)[None]))
        page = self._page
        if page is None or page.first != begin:
            page = Page(begin, self.angles(mx.arange(begin, begin + PAGE)[None]))
            mx.eval(*page.angles)
            self._page = page  # only now, as other threads take it from there
        return page

    def angles(self, positions: mx.array) -> Angles:
        """The angles at integer ``positions`` [b or 1, l]."""
        freqs = positions.astype(mx.float32)[:, None, :, None] * self.inv_freq
        cos, sin = mx.cos(freqs), mx.sin(freqs)
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return Angles(cos, sin)
