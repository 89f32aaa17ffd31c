"""All cases of the self-test."""

from __future__ import annotations

from .attention_cases import attention_cases
from .case import Case
from .expert_cases import expert_cases
from .layer_cases import layer_cases
from .norm_cases import norm_cases


def cases(quick: bool) -> list[Case]:
    """The self-test's cases, or those of a quick run."""
    return [
        *expert_cases(quick),
        *attention_cases(quick),
        *norm_cases(quick),
        *layer_cases(quick),
    ]
