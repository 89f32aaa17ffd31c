"""Flash-MoE sidecars whose manifests are changed anywhere, or whose files are cut or missing."""

import copy
import json
import random
import shutil
from contextlib import contextmanager
from unittest import mock

from tests.adversarial.harness import Unclear, Wrong, clear_error
from tests.adversarial.kinds._gguf import FlashMoeFixture
from tests.adversarial.kinds._streamed import check
from tests.adversarial.kinds.manifest import as_text, change, delete, insert, swap

from glm_fused.loader import load_model
from glm_fused.streaming import sidecar_identity
from glm_fused.streaming.options import StreamOptions

NAME = "flashmoe"
QUICK_CASES = 60
SLOW_CASES = 3000
STEPS = 2
_state = {}


def prepare(folder):
    """Make a sound sidecar, and keep its files."""
    fixture = _state["fixture"] = FlashMoeFixture(folder, prompts=4, steps=STEPS)
    _state["manifest"] = json.loads((fixture.unpacked / "manifest.json").read_text())


def numbers(rng, document):
    """Change the numbers and names that say where an expert's bytes lie."""
    entry = rng.choice(document["entries"])
    key = rng.choice(["repacked_offset", "bytes_per_expert", "exact_byte_length", "layer",
                      "repacked_file", "tensor_family", "tensor_name", "quant_type", "shape",
                      "expert_stride", "expert_major"])  # fmt: skip
    other = rng.choice(document["entries"])
    number = entry.get(key)
    if isinstance(number, int) and rng.random() < 0.5:
        entry[key] = number + rng.choice([-1, 1, 34, 4096, -number, 2**62])
    else:
        entry[key] = copy.deepcopy(other.get(key))


def layout(rng, document):
    """Say that experts lie otherwise."""
    document["layout"] = rng.choice(["layer_major_expert", "expert_major"])
    for entry in document["entries"]:
        entry["expert_major"] = True
        entry["expert_stride"] = entry["bytes_per_expert"] * rng.choice([1, 1, 2, 3])


def mistake(rng, document):
    """Say of two tensors of a layer, which are alike, that each lies where the other does."""
    gate, up = (
        next(e for e in document["entries"] if e["tensor_family"] == f"ffn_{name}_exps")
        for name in ("gate", "up")
    )
    gate["repacked_offset"], up["repacked_offset"] = up["repacked_offset"], gate["repacked_offset"]


def lay_out(rng, path):
    """Write a sidecar with a changed manifest or file."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(_state["fixture"].unpacked, path)
    manifest = path / "manifest.json"
    how = rng.randrange(10)
    if how == 0:
        manifest.write_bytes(as_text(rng, manifest.read_bytes()))
        return
    if how == 1:
        file = rng.choice(sorted(path.glob("*.bin")))
        content = file.read_bytes()
        file.unlink()
        if rng.random() < 0.7:
            file.write_bytes(rng.choice([content[: rng.randrange(len(content))], content + b"x"]))
        return
    document = copy.deepcopy(_state["manifest"])
    if how == 2:
        mistake(rng, document)
    for _ in range(rng.choice([0, 1, 2, 3]) if how == 2 else rng.choice([1, 1, 2, 3])):
        mutation = rng.choice([change, delete, insert, swap, numbers, numbers, numbers, layout])
        try:
            mutation(rng, document)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            break  # an earlier mutation left no such place
    manifest.write_text(json.dumps(document))


def case(seed, folder):
    """Load with the sidecar; what is taken gives the right tokens."""
    rng = random.Random(seed)
    fixture, path = _state["fixture"], folder / "case"
    lay_out(rng, path)
    stream = StreamOptions(budget=8 << 30, slots=rng.choice([2, 4, 8]), sidecar=path)
    try:
        model, _ = load_model(fixture.checkpoint, stream=stream)
    except (ValueError, OSError) as error:
        message = clear_error(error)
        if message is None:
            raise
        if str(path) not in message and str(fixture.checkpoint) not in message:
            raise Unclear(f"no file is named: {message}") from None
        return f"error: {message}"
    try:
        check(model, rng.choice(fixture.prompts), STEPS)
    except Exception as error:
        raise Wrong(f"it was taken, but {error!r}") from None
    return "right"


@contextmanager
def planted():
    """Nobody compares a block of each expert with the checkpoint's."""
    with mock.patch.object(sidecar_identity, "check_sample", lambda *_: None):
        yield
