"""What a launch did and what was found wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One kind of mistake at one place, made `count` times; the rest tells of the first time.

    `buffer` is an index, "threadgroup", or None; `offset` is the byte in it; threads are
    (threadgroup, thread in it), both linear. `other_…` tells of the earlier access in a race."""

    kind: str
    file: str
    line: int
    buffer: int | str | None
    offset: int
    thread: tuple[int, int]
    other_file: str
    other_line: int
    other_thread: tuple[int, int]
    count: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Traffic:
    """The bytes of a buffer that a launch accessed; `unique_…` counts each byte once."""

    read: int
    written: int
    unique_read: int
    unique_written: int


@dataclass
class Report:
    """What a launch did and what was wrong; untraced, divergence alone is found.

    `traffic` is by buffer index, `threadgroup_read` and `threadgroup_written` count each access to
    threadgroup memory in bytes; `seconds` is the wall time."""

    kernel: str
    races: list[Finding] = field(default_factory=list)
    out_of_bounds: list[Finding] = field(default_factory=list)
    uninitialised: list[Finding] = field(default_factory=list)
    divergence: list[Finding] = field(default_factory=list)
    misaligned: list[Finding] = field(default_factory=list)
    traffic: dict[int, Traffic] = field(default_factory=dict)
    threadgroups: int = 0
    threads: int = 0
    simd_functions: int = 0
    barriers: int = 0
    threadgroup_bytes: int = 0
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    seconds: float = 0.0

    @property
    def findings(self) -> list[Finding]:
        strays = [*self.out_of_bounds, *self.uninitialised, *self.misaligned]
        return [*self.races, *strays, *self.divergence]

    @property
    def clean(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        lines = [
            f"{self.kernel}: {self.threadgroups} threadgroups, {self.threads} threads, "
            f"{self.simd_functions} simdgroup functions, {self.barriers} barriers, "
            f"{self.threadgroup_bytes} bytes of threadgroup memory "
            f"(read {self.threadgroup_read}, written {self.threadgroup_written}), "
            f"{self.seconds:.3f} s"
        ]
        lines += [
            f"  buffer {index}: read {t.read} ({t.unique_read} unique), "
            f"written {t.written} ({t.unique_written} unique) bytes"
            for index, t in sorted(self.traffic.items())
        ]
        lines += [f"  {f.kind}: {f.text}" for f in self.findings]
        return "\n".join(lines if self.findings else [*lines, "  no findings"])
