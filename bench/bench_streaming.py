"""Decodes through the MoE layers of a GLM-5.2 slice whose experts are on disk.

    python bench/bench_streaming.py --folder /scratch/experts --slots 32 128

It writes experts of the true shapes (affine4: 21.2 MB each, 256 a layer) in the sidecar's layout,
and deletes them afterwards. For every bank, reading past the page cache, with a cold and with a
warm one, it prints: tokens a second through the slice's MoE layers, hit rate, bytes per token, the
rate at which misses are read beside that of plain reads of whole experts, and the share of the time
in which nothing could be computed for want of them. Plain reads and decoding take turns, so that
both meet the same disk. The hidden states are a random walk, so that neighbouring tokens share
experts. Each layer sees the walk from elsewhere than the next, so lookahead does not help here as
in a model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import machine

from glm_fused import _ext, ops
from glm_fused.formats.weights import FORMATS
from glm_fused.models.config import args_from_config
from glm_fused.models.moe import MoE
from glm_fused.streaming.experts import StreamedExperts
from glm_fused.streaming.sidecar import slab_bytes
from glm_fused.streaming.source import LayerExperts, Part

HIDDEN, INTERMEDIATE, TOP_K, GROUP = 6144, 2048, 8, 64
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
LEAVES = (("weight", "U32", 8), ("scales", "BF16", GROUP), ("biases", "BF16", GROUP))
PARTS = tuple(
    Part(f"{name}.{leaf}", dtype, (n, k // divisor))
    for name, (n, k) in SHAPES.items()
    for leaf, dtype, divisor in LEAVES
)
SLAB = slab_bytes(PARTS)
ROUNDS = 4
TYPES = {"U32": mx.uint32, "BF16": mx.bfloat16}


def write_layers(folder: Path, layers: int, experts: int) -> list[Path]:
    """Write a file per layer; experts differ by where in one random block their codes begin."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, SLAB * 2, np.uint8).tobytes()
    scales = {}
    for part in PARTS[1:3]:  # bfloat16: the upper half of a float32
        values = rng.standard_normal(np.prod(part.shape), np.float32) * 0.01
        scales[part.name.partition(".")[2]] = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    files = []
    for i in range(layers):
        files.append(folder / f"layer_{i:03d}.bin")
        with files[-1].open("wb") as f:
            for _ in range(experts):
                at = 4 * rng.integers(0, SLAB // 4)
                slab = b""
                for part in PARTS:
                    leaf = part.name.partition(".")[2]
                    slab += scales.get(leaf) or codes[at : at + part.nbytes]
                f.write(slab.ljust(SLAB, b"\0"))
            f.flush()
            os.fsync(f.fileno())
    return files


def drop_cache(files: list[Path]) -> None:
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class PlainReads:
    """Reads of whole random slabs, ``depth`` at a time, into memory that is there already."""

    def __init__(self, files: list[Path], depth: int, experts: int, direct: bool):
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self.fds = [os.open(file, flags) for file in files]
        self.experts, self.random = experts, random.Random(1)
        self.buffers = [mmap(-1, SLAB) for _ in range(depth)]
        for buffer in self.buffers:
            buffer.write(bytes(SLAB))
        self.bytes, self.seconds = 0, 0.0

    def run(self, slabs: int = 64) -> None:
        jobs = [
            (self.random.choice(self.fds), self.random.randrange(self.experts) * SLAB)
            for _ in range(slabs)
        ]

        def read(buffer: mmap) -> None:
            while jobs:
                try:
                    fd, offset = jobs.pop()
                except IndexError:  # another thread took the last one
                    return
                got = 0
                while got < SLAB:
                    got += os.preadv(fd, [memoryview(buffer)[got:]], offset + got)

        start = time.perf_counter()
        with ThreadPoolExecutor(len(self.buffers)) as pool:
            list(pool.map(read, self.buffers))
        self.seconds += time.perf_counter() - start
        self.bytes += slabs * SLAB

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@dataclass
class Slice:
    """The MoE layers of a slice, each over a bank of its own."""

    layers: list[MoE]
    banks: list[_ext.SlotBank]
    state: mx.array  # where the random walk is

    @classmethod
    def build(
        cls, files: list[Path], slots: int, direct: bool, options: argparse.Namespace
    ) -> Slice:
        config = json.loads(Path(__file__).with_name("glm52_slice.json").read_text())
        args = args_from_config(config | {"n_routed_experts": options.experts})
        opened = _ext.SlotFiles(list(map(str, files)), [f.stat().st_size for f in files], direct)
        reader = _ext.SlotReader(options.depth, options.split)
        layers, banks = [], []
        mx.random.seed(0)
        for i in range(len(files)):
            locations = []
            for e in range(options.experts):
                at = e * SLAB
                for part in PARTS:
                    locations.append((i, at))
                    at += part.nbytes
            experts = LayerExperts(PARTS, tuple(locations))
            bank = _ext.slot_bank(
                reader, opened, i, [(list(p.shape), TYPES[p.dtype]) for p in PARTS],
                list(experts.locations), [], slots, options.lookahead, options.policy, [], 60.0,
            )  # fmt: skip
            layers.append(cls._layer(args, bank, options.experts))
            banks.append(bank)
        for layer, following in pairwise(layers):
            if options.lookahead:
                layer.switch_mlp.look_ahead(following.gate, following.switch_mlp)
        return cls(layers, banks, mx.random.normal((1, HIDDEN)))

    @staticmethod
    def _layer(args, bank, experts: int) -> MoE:
        moe = MoE(args, args.layers[-1])
        moe.set_dtype(mx.bfloat16)
        a = bank.arrays
        weights = tuple(ops.Weight(a[i : i + 3], FORMATS["affine4"]) for i in (0, 3, 6))
        moe.switch_mlp = StreamedExperts(bank, experts, weights)
        weight = mx.random.normal((experts, HIDDEN)) * HIDDEN**-0.5
        moe.gate.weight = weight.astype(mx.bfloat16)
        for name in SHAPES:
            linear = getattr(moe.shared_experts, name)
            setattr(moe.shared_experts, name, linear.to_quantized(GROUP, 4))
        mx.eval(moe.parameters())
        return moe

    def decode(self, tokens: int, locality: float) -> dict[str, float]:
        """Decode ``tokens`` steps; returns the counters of the banks and the seconds they took."""
        before = self.totals()
        start = time.perf_counter()
        for _ in range(tokens):
            step = mx.random.normal((1, HIDDEN))
            self.state = locality * self.state + (1 - locality**2) ** 0.5 * step
            y = mx.zeros_like(step)
            for i, layer in enumerate(self.layers):
                # Each layer sees the walk shifted: else all would see nearly the same vector.
                x = mx.roll(self.state, 997 * i, axis=1) + 0.01 * mx.fast.rms_norm(y, None, 1e-5)
                y = layer(x.astype(mx.bfloat16)).astype(mx.float32)
            mx.eval(y, self.state)
        seconds = time.perf_counter() - start
        after = self.totals()
        return {"seconds": seconds} | {key: after[key] - before[key] for key in after}

    def totals(self) -> dict[str, float]:
        stats = [bank.stats() for bank in self.banks]
        return {key: sum(s[key] for s in stats) for key in stats[0]}


def measure(
    files: list[Path], slots: int, cache: str, options: argparse.Namespace
) -> dict[str, object]:
    direct = cache == "bypassed"
    plain = PlainReads(files, options.depth, options.experts, direct)
    slice_ = Slice.build(files, slots, direct, options)
    slice_.decode(options.warm_up, options.locality)  # fills the banks
    run = Counter()
    # They take turns, because a disk's rate changes by the minute.
    for i in range(ROUNDS):
        if cache != "warm":
            drop_cache(files)
        plain.run()
        if cache != "warm":
            drop_cache(files)
        tokens = (options.tokens + i) // ROUNDS
        run.update(slice_.decode(tokens, options.locality))
    plain.close()
    rate = plain.bytes / plain.seconds
    missed = run["misses"] * SLAB  # `bytes` would count those of lookahead too
    return {
        "slots": slots,
        "page_cache": cache,
        "tok_per_s": options.tokens / run["seconds"],
        "hit_rate": run["hits"] / (run["hits"] + run["misses"]),
        "mb_per_token": run["bytes"] / options.tokens / 1e6,
        "read_gb_per_s": missed / run["seconds"] / 1e9,
        "plain_read_gb_per_s": rate / 1e9,
        "of_plain_reads": missed / rate / run["seconds"],
        "stall_share": run["wait_us"] / 1e6 / run["seconds"],
    }


def format_row(row: dict[str, object]) -> str:
    cells = (f"{value:.3g}" if isinstance(value, float) else value for value in row.values())
    return "  ".join(f"{name} {cell}" for name, cell in zip(row, cells, strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--folder",
        type=Path,
        required=True,
        help="a new folder in it is deleted at the end",
    )
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=256)
    add("--slots", type=int, nargs="+", default=[32, 128])
    add("--tokens", type=int, default=48)
    add("--warm-up", type=int, default=24)
    add("--locality", type=float, default=0.9, help="correlation of a token's state with the last")
    add("--policy", default="learned")
    add("--lookahead", type=int, default=0)
    add("--depth", type=int, default=16)
    add("--split", type=int, default=1 << 20)
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    folder = options.folder / f"bench_streaming_{os.getpid()}"
    folder.mkdir(parents=True)
    needed, free = options.layers * options.experts * SLAB, shutil.disk_usage(folder).free
    try:
        if needed > free:
            raise SystemExit(f"{needed / 1e9:.1f} GB needed in {folder}, {free / 1e9:.1f} free")
        files = write_layers(folder, options.layers, options.experts)
        rows = []
        for slots in options.slots:
            for cache in ("bypassed", "cold", "warm"):
                rows.append(measure(files, slots, cache, options))
                print(format_row(rows[-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    if options.json:
        settings = {k: str(v) for k, v in vars(options).items()}
        document = {"machine": machine(), "options": settings, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
