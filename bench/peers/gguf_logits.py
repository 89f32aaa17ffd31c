"""Compares our logits with llama.cpp's on the same GGUF files: the bundled model in each type.

llama.cpp is set up as in llama_gguf.py, and `glm-fused convert` writes the files. Then:

    python bench/peers/gguf_logits.py --build build

For each type and each stretch of `index_topk` tokens of a prompt of five times as many: how far our
logits are from llama.cpp's on the same file, as they are and with float32 activations, which it
has, too; and how far llama.cpp's own are from those that it has on the float32 file, which is what
the type costs there (weights, and activations where it rounds those). All are root mean squares,
relative to the logits'. From the second stretch on selections count too: of scores that are equal,
of which an indexer's ReLU makes many, those of the lowest keys are selected here and any there. So
the float32 activations come a second time, with the keys that llama.cpp's own top-k selects.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from llama_cpp import Library, TopK
from llama_gguf import llama_parser
from mlx.utils import tree_map
from numpy.typing import NDArray
from release import write_release

sys.path.append(str(Path(__file__).parents[1]))

from logit_errors import TOKENS, llama, logits

from glm_fused import load, load_model, ops
from glm_fused.conversion.gguf import to_gguf
from glm_fused.conversion.target import Types
from glm_fused.formats.weights import FORMATS, dequantize
from glm_fused.host import to_numpy
from glm_fused.models.config import ModelArgs
from glm_fused.models.decoder import Model
from glm_fused.models.layers import Embedding

TYPES = ("fp32", "fp16", "bf16", "q8_0")
STRETCHES = 5
Logits = NDArray[np.float32]


def theirs(build: Path, gguf: Path, vocabulary: int) -> Logits:
    """llama.cpp's logits [tokens, vocabulary] of the tokens beside the file."""
    program, path = llama(build, gguf, gguf.parent)
    return logits([program, "--float32-caches", path], gguf.parent, vocabulary)


def ours(gguf: Path, tokens: list[int], float32: bool) -> Logits:
    """Our logits [tokens, vocabulary], perhaps with activations in float32."""
    model, _ = load_model(gguf)
    if float32:
        widen(model)
    return to_numpy(model(mx.array([tokens])).astype(mx.float32))[0]


def widen(model: Model) -> None:
    """Have the model compute in float32, which follows from its embedding and norms."""
    for _, module in model.named_modules():
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            module.update(tree_map(lambda a: a.astype(mx.float32), module.parameters()))
    weight = model.model.embed_tokens.as_weight()
    dense = weight.format.mode == "dense"
    values = weight.planes[0] if dense else dequantize(weight, mx.float32)
    model.model.embed_tokens = Embedding(*values.shape)
    model.model.embed_tokens.weight = values.astype(mx.float32)


@contextmanager
def its_ties(ggml: Library) -> Iterator[None]:
    """Have llama.cpp's own top-k select the keys: it decides which of equal scores go in."""

    def select(
        q: mx.array,
        keys: mx.array,
        weights: mx.array,
        k: int,
        *,
        scale: float,
        weight_scale: float,
        start: mx.array | None,
    ) -> mx.array:
        assert len(q) == 1 and start is None  # one sequence
        products = np.maximum(np.einsum("qhd,td->qht", to_numpy(q[0]), to_numpy(keys[0])), 0)
        factors = to_numpy(weights[0]) * np.float32(scale * weight_scale)
        scores = np.einsum("qh,qht->qt", factors, products)
        count, total = scores.shape
        masked = np.arange(total) > np.arange(total - count, total)[:, None]
        scores[masked] = -np.inf
        best = TopK(ggml, scores, k).selected()
        best[np.take_along_axis(masked, best, axis=-1)] = total
        best.sort(axis=-1)
        return mx.array(np.where(best < total, best, -1))[None]

    with patch.object(ops, "indexer_topk", select):
        yield


def apart(a: Logits, b: Logits, stretch: int) -> list[float]:
    """The relative distance of each stretch's logits."""
    parts = zip(np.split(a, STRETCHES), np.split(b, STRETCHES), strict=True)
    assert len(a) == STRETCHES * stretch
    return [float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))) for x, y in parts]


def compare(build: Path, folder: Path, tokens: list[int], args: ModelArgs) -> None:
    """Print four lines for each type, of the files in a folder."""
    ggml = Library(build, threads=1)
    to_numpy(mx.array(tokens, mx.int32)).tofile(folder / TOKENS)
    stretch, vocabulary = args.index_topk, args.vocab_size
    exact = theirs(build, folder / "fp32.gguf", vocabulary)
    print(f"type   same token  {'':30}relative distance of stretches of {stretch} tokens")
    for kind in TYPES:
        gguf = folder / f"{kind}.gguf"
        its = theirs(build, gguf, vocabulary)
        with its_ties(ggml):
            tied = ours(gguf, tokens, True)
        for name, mine, against in (
            ("ours from llama.cpp's", ours(gguf, tokens, False), its),
            ("ours with float32 activations", ours(gguf, tokens, True), its),
            ("ours so, and with its ties", tied, its),
            ("llama.cpp's from fp32", its, exact),
        ):
            same = float(np.mean(mine.argmax(-1) == against.argmax(-1)))
            distances = "".join(f"{d:>10.1e}" for d in apart(mine, against, stretch))
            print(f"{kind:6}{same:>11.1%}  {name:<30}{distances}")


def main() -> None:
    options = llama_parser(__doc__).parse_args()
    mx.set_default_device(mx.cpu)
    model, tokenizer = load("demo")
    stretch = model.args.index_topk
    text = Path(argparse.__file__).read_text()
    tokens = tokenizer.encode(text[:10_000])[: STRETCHES * stretch]
    with tempfile.TemporaryDirectory() as name:
        folder, release = Path(name), Path(name) / "release"
        release.mkdir()
        write_release(release)  # bfloat16, so that all types but the last have the same values
        for kind in TYPES:
            fmt = FORMATS[kind]
            to_gguf(release, folder / f"{kind}.gguf", Types(fmt, fmt))
        compare(options.build, folder, tokens, model.args)


if __name__ == "__main__":
    main()
