"""What bodies of both of OpenAI's text APIs have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..generation.limits import SAMPLING
from ..generation.options import Options
from .errors import ApiError, invalid
from .service import Service

MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
Body = TypeVar("Body", bound=BaseModel)


def only(*values: Any, because: str) -> BeforeValidator:
    """Refuses what would change an answer, but does not here; ``values`` change nothing."""

    def check(value: Any) -> Any:
        if value not in (None, *values):
            usual = " or ".join(str(v) for v in values) or "no value"
            raise ValueError(f"expected {usual}: {because}")
        return value

    return BeforeValidator(check)


def option(name: str) -> BeforeValidator:
    """Refuses what an option of this name cannot have."""
    allowed = SAMPLING[name]

    def check(value: Any) -> Any:
        if value is not None and not allowed.holds(value):
            raise ValueError(f"expected {allowed.expected}")
        return value

    return BeforeValidator(check)


def _stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if texts is None or (
        isinstance(texts, list)
        and len(texts) <= MOST_STOPS
        and all(isinstance(text, str) and text for text in texts)
    ):
        return texts
    raise ValueError(f"expected a text or up to {MOST_STOPS} texts, none empty")


class StreamOptions(BaseModel):
    """What a stream has besides the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # a stream without any is one that clients can read


_NO_PENALTY = only(0, because="this server has repetition_penalty instead")
_NO_BIAS = only({}, because="this server changes no tokens' logits")


class Sampled(BaseModel):
    """How to generate; fields that OpenAI does not have are named as mlx-lm's server names them."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: str
    temperature: Annotated[float | None, option("temp")] = None
    top_p: Annotated[float | None, option("top_p")] = None
    top_k: Annotated[int | None, option("top_k")] = None
    min_p: Annotated[float | None, option("min_p")] = None
    repetition_penalty: Annotated[float | None, option("repetition_penalty")] = None
    repetition_context_size: Annotated[int | None, option("repetition_context_size")] = None
    frequency_penalty: Annotated[float | None, _NO_PENALTY] = None
    presence_penalty: Annotated[float | None, _NO_PENALTY] = None
    logit_bias: Annotated[dict[str, Any] | None, _NO_BIAS] = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = None
    n: int | None = Field(default=None, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # says who asks, and changes nothing

    @property
    def choices(self) -> int:
        """How many answers there are to each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self, service: Service, max_tokens: int, choice: int) -> Options:
        """How to generate one of the choices: with a seed, each draws texts of its own."""
        seed = None if self.seed is None else (self.seed + choice) % 2**64
        return service.options(
            max_tokens=max_tokens,
            temp=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
            stop=None if self.stop is None else tuple(self.stop),
            seed=seed,
        )


def checked(
    kind: type[Body], body: dict[str, Any], also: Callable[[Body], None] = lambda body: None
) -> Body:
    """The body as ``kind``, after a check of what must fit together.

    Raises ApiError (400), naming the field, for a body that does not fit.
    """
    try:
        found = kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error, body) from None
    also(found)
    return found


def misfit(param: str, text: str) -> ApiError:
    """The error of a field that does not fit another."""
    return ApiError(400, f"{param}: {text}.", param=param)
