"""Damaged GGUF headers are refused before data is read, in an error that names the file."""

import random
import struct
from contextlib import contextmanager
from unittest import mock

import gguf_raw
import mlx.core as mx
from conftest import tiny_config
from gguf_files import write_gguf
from gguf_raw import ARRAY, BOOL, STRING, UINT32, Entry
from tests.adversarial.harness import Unclear, Wrong

from glm_fused.checkpoint import gguf_header as reader
from glm_fused.loader import load_model

NAME = "gguf_header"
SLOW_CASES = 5_000
QUICK_CASES = 100
LARGE = (2**31, 2**40, 2**63, 2**64 - 1)
# Keys without which there is no config.
REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon", "attention.q_lora_rank",
    "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "attention.indexer.head_count", "attention.indexer.key_length", "attention.indexer.top_k",
    "rope.dimension_count", "rope.freq_base", "expert_feed_forward_length", "expert_count",
    "expert_used_count", "expert_shared_count", "expert_weights_scale", "expert_weights_norm",
    "leading_dense_block_count",
)  # fmt: skip


def prepare(folder):
    """Make a good file."""
    write_gguf(folder / "good.gguf", tiny_config(num_hidden_layers=2, indexer_types=["full"] * 2))


def begin(rng, raw):
    """Another magic, version or byte order."""
    if rng.random() < 0.3:
        raw.magic = rng.choice([b"GGML", b"gguf", b"PK\3\4", bytes(4), b"FUGG"])
    else:
        version = rng.choice([0, 1, 4, 0x03000000, 2**32 - 1])
        raw.version = struct.pack("<I", version)


def counts(rng, raw):
    """Counts that are not those of the lists."""
    name = rng.choice(["tensor_count", "entry_count"])
    real = len(raw.tensors if name == "tensor_count" else raw.entries)
    setattr(raw, name, rng.choice([0, 1, real - 1, real + 1, 2 * real, *LARGE]))


def key(rng, raw):
    """A key that is too long, no text, or there twice."""
    entry = rng.choice(raw.entries)
    kind = rng.randrange(4)
    if kind == 0:
        raw.entries.append(Entry(entry.key, entry.kind, entry.value))
    elif kind == 1:
        entry.key = b"\xff" + entry.key
    elif kind == 2:
        entry.key = b"x" * rng.randrange(65_536, 70_000)
    else:
        entry.key = rng.choice(raw.entries[raw.entries.index(entry) - 1 :][:1]).key


def value(rng, raw):
    """A value of no type, longer than the file, or no boolean."""
    kind = rng.randrange(6)
    if kind == 0:
        rng.choice(raw.entries).kind = rng.choice([13, 14, 99, 2**32 - 1])
    elif kind == 1:
        length = struct.pack("<Q", rng.choice([10**6, *LARGE]))
        raw.entries.append(Entry(b"added", STRING, length + b"short"))
    elif kind == 2:
        head = struct.pack("<IQ", rng.choice([0, 4, 8, 10, 12]), rng.choice([10**7, *LARGE]))
        raw.entries.append(Entry(b"added", ARRAY, head + bytes(16)))
    elif kind == 3:
        head = struct.pack("<IQ", rng.choice([ARRAY, 13, 2**32 - 1]), 1)
        raw.entries.append(Entry(b"added", ARRAY, head + bytes(16)))
    elif kind == 4:
        raw.entries.append(Entry(b"added", BOOL, bytes([rng.randrange(2, 256)])))
    else:
        raw.entries.append(Entry(b"added", STRING, gguf_raw.text(b"text \xc3\x28")))


def alignment(rng, raw):
    """An alignment that is none."""
    number = rng.choice([0, 3, 24, 33, 2**21, 2**31, 2**32 - 1])
    kind, packed = rng.choice([(UINT32, struct.pack("<I", number)), (BOOL, b"\1")])
    raw.entries.append(Entry(b"general.alignment", kind, packed))


def name(rng, raw):
    """A tensor's name that is too long, no text, there twice, or of no tensor of the model."""
    tensor = rng.choice(raw.tensors)
    others = [t.name for t in raw.tensors if t is not tensor]
    tensor.name = rng.choice(
        [b"x" * 65, b"x" * 10_000, b"\xff.weight", rng.choice(others), b"", b"blk.0.attn_q.weight",
         tensor.name + b"\0", b"blk.00." + tensor.name, b"output_norm.bias"]
    )  # fmt: skip


def sizes(rng, raw):
    """Dimensions that are too many, too large, or others than the model's."""
    tensor = rng.choice(raw.tensors)
    at = rng.randrange(len(tensor.sizes))
    kind = rng.randrange(4)
    if kind == 0:
        tensor.sizes = rng.choice([[], [1] * 5, [1] * 40])
    elif kind == 1:
        tensor.sizes[at] = rng.choice([0, *LARGE])
    elif kind == 2:
        tensor.sizes[at] += rng.choice([-1, 1, 2, 32])
    else:
        tensor.sizes = [2**31 - 1] * 4


def kind_of_tensor(rng, raw):
    """A type that ggml has not, or that takes other bytes."""
    tensor = rng.choice(raw.tensors)
    kinds = [0, 1, 2, 4, 5, 8, 9, 12, 15, 24, 28, 31, 36, 99, 2**31, 2**32 - 1]
    tensor.kind = rng.choice([kind for kind in kinds if kind != tensor.kind])


def place(rng, raw):
    """An offset that is not aligned, past the end, or where another tensor is."""
    tensor = rng.choice(raw.tensors[1:])
    values = [tensor.offset + 1, tensor.offset + 32, tensor.offset - 32, 0, *LARGE, len(raw.data)]
    tensor.offset = rng.choice(values)


def config(rng, raw):
    """A key that the config needs: missing, of another type, or impossible."""
    entry = raw.entry(f"glm-dsa.{rng.choice(REQUIRED)}")
    kind = rng.randrange(3)
    if kind == 0:
        raw.entries.remove(entry)
    elif kind == 1:
        entry.kind, entry.value = STRING, gguf_raw.text(b"7")
    else:
        entry.kind, entry.value = 5, struct.pack("<i", rng.choice([-1, -(2**31)]))


def config_value(rng, raw):
    """A value that no GLM has."""
    changes = {
        "general.architecture": (STRING, gguf_raw.text(rng.choice([b"llama", b"deepseek2", b""]))),
        "glm-dsa.expert_gating_func": (UINT32, struct.pack("<I", rng.choice([1, 3, 2**32 - 1]))),
        "glm-dsa.block_count": (UINT32, struct.pack("<I", rng.choice([0, 1, 3, 2**31]))),
        "glm-dsa.vocab_size": (UINT32, struct.pack("<I", rng.choice([1, 255, 257, 2**31]))),
        "glm-dsa.expert_count": (UINT32, struct.pack("<I", rng.choice([1, 7, 9, 10**9]))),
        "glm-dsa.attention.indexer.types": rng.choice(
            [(UINT32, struct.pack("<I", 1)), (ARRAY, struct.pack("<IQ", BOOL, 1) + b"\1"),
             (ARRAY, struct.pack("<IQ", BOOL, 2) + b"\0\1"),
             (ARRAY, struct.pack("<IQ2I", UINT32, 2, 1, 2))]
        ),
        "glm-dsa.rope.freq_base": (6, struct.pack("<f", rng.choice([0.0, -1.0, float("nan")]))),
    }  # fmt: skip
    changed = rng.choice(list(changes))
    if changed == "glm-dsa.block_count" and rng.random() < 0.5:
        raw.entries.remove(raw.entry("glm-dsa.attention.indexer.types"))
    entry = raw.entry(changed)
    entry.kind, entry.value = changes[changed]


def split(rng, raw):
    """Keys of shards, in a file that is none."""
    chosen = rng.choice(["split.count", "split.no", "split.tensors.count"])
    number = rng.choice([2, 3, 77, 2**32 - 1])
    raw.entries.append(Entry(chosen.encode(), UINT32, struct.pack("<I", number)))


def drop(rng, raw):
    """A file that has one tensor less, with the bytes of the others in their places."""
    at = rng.randrange(len(raw.tensors))
    ends = [t.offset for t in raw.tensors[1:]] + [len(raw.data)]
    first, end = raw.tensors.pop(at).offset, ends[at]
    raw.data = raw.data[:first] + raw.data[end:]
    for tensor in raw.tensors[at:]:
        tensor.offset -= end - first


def extent(rng, raw):
    """Bytes too few or too many."""
    if rng.random() < 0.5:
        raw.data = raw.data[: rng.randrange(len(raw.data) - 32)]
    else:
        raw.data += bytes(rng.randrange(32, 4096))


MUTATIONS = (begin, counts, key, value, alignment, name, sizes, kind_of_tensor, place, config,
             config_value, split, drop, extent)  # fmt: skip


def damage(seed, content):
    """The bytes of a damaged file, by a mutation or cut within the header."""
    rng = random.Random(seed)
    raw = gguf_raw.parse(content)
    if rng.random() < 0.1:
        return content[: rng.randrange(len(raw.header()))]
    MUTATIONS[seed % len(MUTATIONS)](rng, raw)
    return raw.bytes()


def case(seed, folder):
    """Load one damaged file."""
    good = (folder / "good.gguf").read_bytes()
    path = folder / "bad.gguf"
    changed = damage(seed, good)
    path.write_bytes(changed)
    before = mx.get_active_memory()
    try:
        load_model(path, lazy=True)
    except (ValueError, OSError) as error:
        if mx.get_active_memory() - before > 1 << 20:
            raise Wrong("data was read before it was refused") from None
        if str(path) not in str(error):
            raise Unclear(f"no file is named: {error}") from None
        raise
    if changed != good:
        raise Wrong("accepted")
    return "right"


@contextmanager
def planted():
    """Nobody compares where tensors lie."""
    with mock.patch.object(reader, "_check_extents", lambda *args: None):
        yield
