"""What is known of a shader's kernels and function constants."""

from __future__ import annotations

from dataclasses import dataclass

# For each attribute of a kernel parameter, what the generated entry point passes for it.
POSITIONS = {
    "threadgroup_position_in_grid": "msl_extent{at->threadgroup_position}",
    "thread_position_in_threadgroup": "msl_extent{at->thread_position_in_threadgroup}",
    "thread_position_in_grid": "msl_extent{at->thread_position_in_grid}",
    "threadgroups_per_grid": "msl_extent{at->threadgroups_per_grid}",
    "threads_per_threadgroup": "msl_extent{at->threads_per_threadgroup}",
    "dispatch_threads_per_threadgroup": "msl_extent{at->threads_per_threadgroup}",
    "threads_per_grid": "msl_extent{at->threads_per_grid}",
    "thread_index_in_threadgroup": "at->thread_index",
    "simdgroup_index_in_threadgroup": "at->simdgroup_index",
    "thread_index_in_simdgroup": "at->lane",
    "simdgroups_per_threadgroup": "at->simdgroups",
    "dispatch_simdgroups_per_threadgroup": "at->simdgroups",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "quadgroup_index_in_threadgroup": "(at->thread_index >> 2)",
    "thread_index_in_quadgroup": "(at->thread_index & 3)",
    "quadgroups_per_threadgroup": "((at->simdgroups * 32 + 3) >> 2)",
}


@dataclass(frozen=True)
class Argument:
    """A kernel parameter; `kind` is "buffer", "threadgroup" or "position", which has index -1."""

    kind: str
    index: int
    name: str
    type: str
    space: str = ""
    writable: bool = False
    reference: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.kind, self.index


@dataclass(frozen=True)
class FunctionConstant:
    name: str
    type: str
    index: int


@dataclass(frozen=True)
class EntryPoint:
    """A kernel under its host name; `expression` names the function, e.g. `copy<float, 4>`.

    `most_threads` names the constant that its max_total_threads_per_threadgroup gives, if any."""

    name: str
    expression: str
    arguments: tuple[Argument, ...]
    passed: tuple[str, ...]
    most_threads: str = ""
