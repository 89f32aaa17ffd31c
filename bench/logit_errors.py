"""How far logits of the slice are from those of float32 arithmetic on the same weights.

All formats of the slice hold the same values (glm52_slice.py). What is compared with is glm_fused
on affine4 with float32 activations, whose dot products differ from float64's by 1e-6.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from glm52_slice import Slice
from numpy.typing import NDArray

HERE = Path(__file__).parent
TOKENS, LOGITS = "tokens.bin", "logits.bin"


def ours(of: Slice, weights: str, *more: str) -> list[str]:
    """The command that writes our logits, but for its files."""
    model = ["--slice", *of.arguments(), "--weights", weights, *more]
    return [sys.executable, str(HERE / "decode_worker.py"), *model, "--logits"]


def llama(build: Path, gguf: Path, folder: Path) -> list[str]:
    """The command that writes llama.cpp's, but for its files; its program goes into ``folder``."""
    program = folder / "llama_logits"
    if not program.exists():
        cache = (build / "CMakeCache.txt").read_text()
        source = cache.split("CMAKE_HOME_DIRECTORY:INTERNAL=")[1].splitlines()[0]
        library = next(build.rglob("libllama.so")).parent
        command = [
            "c++",
            "-std=c++17",
            str(HERE / "peers" / "llama_logits.cpp"),
            "-o",
            str(program),
        ]
        command += [f"-I{source}/include", f"-I{source}/ggml/include"]
        command += [f"-L{library}", f"-Wl,-rpath,{library}", "-lllama", "-lggml", "-lggml-base"]
        subprocess.run(command, check=True)
    return [str(program), str(gguf)]


def logits(command: list[str], folder: Path, vocabulary: int) -> NDArray[np.float32]:
    """The logits [tokens, vocabulary] that a command writes for the tokens in ``folder``."""
    files = [str(folder / TOKENS), str(folder / LOGITS)]
    subprocess.run([*command, *files], check=True)
    return np.fromfile(folder / LOGITS, np.float32).reshape(-1, vocabulary)


def errors(
    commands: Mapping[str, list[str]], of: Slice, tokens: int, folder: Path
) -> dict[str, dict[str, float]]:
    """For each command's logits of a prompt, the distances from the right ones as parts of these.

    Returns the median over the tokens and the tenth and ninetieth percentiles: where rounding makes
    a router choose another expert, a token's logits are further away than any rounding takes them.
    """
    prompt = np.random.default_rng(1).integers(0, of.vocabulary, tokens, np.int32)
    prompt.tofile(folder / TOKENS)
    right = logits(ours(of, "affine4", "--fp32"), folder, of.vocabulary)
    found = {}
    for name, command in commands.items():
        apart = np.linalg.norm(logits(command, folder, of.vocabulary) - right, axis=1)
        parts = np.percentile(apart / np.linalg.norm(right, axis=1), (50, 10, 90))
        found[name] = dict(zip(("error", "error p10", "error p90"), map(float, parts), strict=True))
    return found
