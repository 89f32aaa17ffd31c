"""GGUF files whose blocks hold any bytes: scales that are no numbers, all bits set, random ones.

A model whose scales are all numbers has the bits of the reference path, also where experts are
streamed; of another the loader names the tensor.
"""

import random
from contextlib import contextmanager
from unittest import mock

import gguf
import gguf_files
import gguf_raw
import mlx.core as mx
import numpy as np
from conftest import tiny_config
from gguf_files import Q
from tests.adversarial.harness import Unclear, Wrong

from glm_fused import reference_path
from glm_fused.checkpoint import reading
from glm_fused.checkpoint.gguf_formats import format_of
from glm_fused.host import to_numpy
from glm_fused.loader import load_model
from glm_fused.selftest.synthetic import Bits
from glm_fused.streaming.options import StreamOptions

NAME = "gguf_blocks"
QUICK_CASES = 60
SLOW_CASES = 3000
CONFIG = tiny_config(
    num_hidden_layers=2,
    indexer_types=["full", "full"],
    first_k_dense_replace=1,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=256,
    q_lora_rank=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    index_n_heads=2,
    n_routed_experts=4,
)
TYPES = [
    kind
    for kind in gguf.GGML_QUANT_SIZES
    if kind.name not in ("F16", "F32", "BF16")
    and hasattr(gguf.quants, kind.name)
    and format_of(kind.name) is not None
]
PACKED = ("_exps.weight", "_shexp.weight", "attn_output.weight", "ffn_down.weight", "output.weight")
TOKENS = mx.array([[(i * 37 + 11) % 250 for i in range(20)]])
_files = {}


def prepare(folder):
    """Files of each type are made when a case asks for them."""
    _files.clear()


def sound(kind, folder):
    """The parts of a file whose `PACKED` tensors are in a type."""
    if kind not in _files:
        raw = {}
        for seed, (name, values) in enumerate(gguf_files.gguf_tensors(CONFIG).items()):
            if name.endswith(PACKED) and values.shape[-1] % 256 == 0:
                weight = Bits(seed).weight(values.shape, format_of(kind.name), mx.float32)
                raw[name] = np.array(weight.planes[0]), kind
            else:
                raw[name] = gguf_files._typed(name, values, "float32", None)
        path = gguf_files.write_gguf(folder / "sound.gguf", CONFIG, raw=raw)
        _files[kind] = path.read_bytes(), {name: data.shape for name, (data, _) in raw.items()}
    content, shapes = _files[kind]
    return gguf_raw.parse(content), shapes


def damage(rng, blocks):
    """Change some of the blocks [count, bytes of one]."""
    at, size = rng.randrange(len(blocks)), blocks.shape[1]
    half = rng.choice([0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x8000, 0x0001, 0x7BFF, 0xFBFF])
    how = rng.randrange(6)
    if how == 0:
        blocks[at] = rng.choice([0, 0xFF, 0x7F, 0x80])
    elif how == 1:
        blocks[:] = rng.choice([0, 0xFF, 0x7F])
    elif how == 2:
        blocks[at] = list(rng.randbytes(size))
    elif how == 3:
        place = rng.choice([0, 2, size - 4, size - 2])
        blocks[at, place : place + 2] = half & 0xFF, half >> 8
    elif how == 4:
        blocks[at, rng.randrange(size)] ^= 1 << rng.randrange(8)
    else:
        blocks[at:] = blocks[: len(blocks) - at].copy()


def damaged(rng, kind, folder):
    """Write a file with a changed tensor; returns its path, and whether all values are numbers."""
    raw, shapes = sound(kind, folder)
    tensor = rng.choice([t for t in raw.tensors if t.kind == kind.value])
    shape = shapes[tensor.name.decode()]
    data = np.frombuffer(raw.data, np.uint8).copy()
    _, size = gguf.GGML_QUANT_SIZES[kind]
    mine = data[tensor.offset : tensor.offset + int(np.prod(shape))]
    damage(rng, mine.reshape(-1, size))
    raw.data = data.tobytes()
    path = folder / "case.gguf"
    path.write_bytes(raw.bytes())
    with np.errstate(all="ignore"):
        finite = np.isfinite(gguf.quants.dequantize(mine.reshape(shape), kind)).all()
    if kind == Q.MXFP4:  # 255 is no exponent, but the gguf package counts on
        finite = not (mine.reshape(-1, size)[:, 0] == 255).any()
    return path, bool(finite)


def logits(path, **options):
    """The logits of a prompt and of a step, as they lie in memory, where they are numbers."""
    model, _ = load_model(path, **options)
    cache = model.make_cache()
    both = mx.concatenate([model(TOKENS, cache), model(TOKENS[:, :1], cache)], axis=1)
    found = to_numpy(both)
    return np.where(np.isnan(found), np.uint32(0x7FC00000), found.view(np.uint32))


def case(seed, folder):
    """Load one file, run it on every path, and hold what they say against each other."""
    rng = random.Random(seed)
    path, finite = damaged(rng, rng.choice(TYPES), folder)
    stream = StreamOptions(budget=8 << 30, slots=3)
    streamed = logits(path, stream=stream) if rng.random() < 0.5 and finite else None
    try:
        found = logits(path)
    except ValueError as error:
        if finite:
            raise Wrong(f"all scales are numbers: {error}") from None
        if ".weight has a block's scale " not in str(error):
            raise Unclear(str(error)) from None
        return f"error: {error}"
    if not finite:
        raise Wrong("a scale that is no number passed unnoticed")
    with reference_path():
        expected = logits(path)
    if not np.array_equal(found, expected):
        raise Wrong("the fused path differs from the reference")
    if streamed is not None and not np.array_equal(streamed, expected):
        raise Wrong("streamed experts differ from resident ones")
    return "right"


@contextmanager
def planted():
    """Nobody looks at scales."""
    with mock.patch.object(reading, "_check_scales", lambda *_: None):
        yield
