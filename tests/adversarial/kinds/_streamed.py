"""A tiny streamed model, and what the resident one says to a few prompts."""

import random
from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from conftest import tiny_config, write_checkpoint
from mlx_lm.generate import generate_step
from tests.adversarial.harness import Wrong

from glm_fused.checkpoint import checked as headers
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.host import to_numpy
from glm_fused.loader import load_model
from glm_fused.streaming.banks import attach_banks, find_source, plan_streaming
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack

STEPS = 5
TOP_K, EXPERTS = 2, 8
CONFIG = tiny_config(
    num_hidden_layers=3,
    indexer_types=["full", "full", "shared"],
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=64,
    q_lora_rank=64,
    kv_lora_rank=64,
    num_attention_heads=2,
    num_key_value_heads=2,
    qk_nope_head_dim=32,
    v_head_dim=32,
    index_n_heads=2,
    num_experts_per_tok=TOP_K,
    n_routed_experts=EXPERTS,
    eos_token_id=None,
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, its chunks, and the resident model's tokens and float32 logits."""

    tokens: tuple[int, ...]
    chunk: int
    expected: tuple[int, ...] = ()
    logits: tuple[np.ndarray, ...] = ()


def generate(model, prompt, steps=STEPS):
    """Yield (token, logits), greedily, from mlx-lm's own loop."""
    cache = model.make_cache()
    yield from generate_step(
        mx.array(prompt.tokens),
        model,
        max_tokens=steps,
        prompt_cache=cache,
        prefill_step_size=prompt.chunk,
    )


def drain():
    """Wait for mlx-lm's last steps, which nobody asks for.

    If one failed, MLX would raise its error for whoever comes next. Setting the limit synchronizes
    every thread's streams, and raises one stream's error at a time.
    """
    while True:
        with suppress(RuntimeError):
            mx.set_cache_limit(mx.set_cache_limit(0))
            return


def generate_exactly(model, prompt, steps=STEPS):
    """Generate as `generate` does, without mlx-lm's last step, so that every read is needed."""
    cache = model.make_cache()

    def step(y):
        logit = model(y[None], cache)[:, -1, :]
        logit = (logit - mx.logsumexp(logit, keepdims=True)).squeeze(0)
        return mx.argmax(logit, axis=-1, keepdims=True), logit

    y, last = mx.array(prompt.tokens[:-1]), mx.array(prompt.tokens[-1:])
    for chunk in [y[i : i + prompt.chunk] for i in range(0, y.size, prompt.chunk)]:
        model(chunk[None], cache)
        mx.eval([c.state for c in cache])
    y, logit = step(last)
    for i in range(steps):
        mx.async_eval(y, logit)
        following = step(y) if i + 1 < steps else (y, logit)
        yield y.item(), logit
        y, logit = following


def check(model, prompt, steps=STEPS, how=generate_exactly):
    """Raise `Wrong` unless the model says what the resident one does, to the bit.

    What it says before an error is compared, too.
    """
    for _ in checked(model, prompt, steps, how):
        pass


def checked(model, prompt, steps, how):
    """`check` as a generator of the tokens; one that is dropped compares what it has said."""
    tokens, logits, fault = [], [], ""
    try:
        for token, logit in how(model, prompt, steps):
            tokens.append(token)
            logits.append(logit)
            yield token
        if len(tokens) < steps:
            raise Wrong(f"{len(tokens)} tokens, expected {steps}")
    except Exception as error:
        fault = f", before {error!r}"
        raise
    finally:
        _compare(tokens, logits, prompt, fault)


def _floats(logits):
    return to_numpy(logits.astype(mx.float32))


def _compare(tokens, logits, prompt, fault):
    expected = list(prompt.expected[: len(tokens)])
    if tokens != expected:
        raise Wrong(f"tokens {tokens}, expected {expected}{fault}")
    for i, (found, right) in enumerate(zip(logits, prompt.logits, strict=False)):
        if not np.array_equal(_floats(found), right):
            raise Wrong(f"the right tokens, but the logits of step {i} differ{fault}")


class Fixture:
    """A checkpoint, whose experts are also in a sidecar with checksums, and two models.

    One is `resident`, the other is `shared`, into which `model` puts new banks. ``checkpoint`` is
    what is loaded, ``unpacked`` the sidecar of experts that are not packed, None for its own files.
    """

    def __init__(self, folder, prompts=8, steps=STEPS):
        self.folder = folder / "model"
        self.checkpoint, self.unpacked = self.write()
        pack(self.checkpoint, self.folder / "sidecar")
        self.resident, _ = load_model(self.checkpoint)
        self.prompts = [self._prompt(self.resident, i, steps) for i in range(prompts)]
        drain()
        opened = Checkpoint.open(self.checkpoint)
        self._args, self._manifest = headers.checked(opened)
        sidecars = {False: self.unpacked, True: self.folder / "sidecar"}
        self._sources = {p: find_source(opened, self._args, s) for p, s in sidecars.items()}
        stream = StreamOptions(budget=8 << 30, slots=4)
        self.shared, _ = load_model(self.checkpoint, stream=stream)

    def write(self):
        """Write the checkpoint; returns it, and the sidecar of unpacked experts."""
        write_checkpoint(self.folder, CONFIG, quantization={"group_size": 32, "bits": 4}, shards=2)
        return self.folder, None

    @staticmethod
    def _prompt(model, number, steps):
        rng = random.Random(number)
        length = (1, 10, 4, 16, 2, 24, 7, 12)[number % 8]
        tokens = tuple(rng.randrange(3, 250) for _ in range(length))
        prompt = Prompt(tokens, rng.choice([3, 8, 2048]))
        said, logits = zip(*generate(model, prompt, steps), strict=True)
        return Prompt(
            tokens,
            prompt.chunk,
            said,
            tuple(to_numpy(logit.astype(mx.float32)) for logit in logits),
        )

    def model(self, packed, **options):
        """The model with new banks; those of the last call are gone."""
        options = StreamOptions(budget=8 << 30, patience=5.0, **options)
        source = self._sources[packed]
        plan = plan_streaming(self._manifest, self._args, source, options, "auto")
        self.shared.streaming = None
        formats = self._manifest.formats
        streaming = attach_banks(self.shared, self._args, source, plan, options, formats)
        self.shared.streaming = streaming
        return self.shared


def random_options(rng):
    """Random options of streaming: files, bank, policy, lookahead, reads."""
    spares = rng.choice([0, 0, 1, 2])
    policy = rng.choice(["learned", "lru", "s3fifo", "pinned"])
    return {
        "packed": rng.random() < 0.5,
        "slots": rng.randrange(TOP_K + spares, EXPERTS + 1),
        "spares": spares,
        "policy": policy,
        "direct": rng.random() < 0.4,
        "depth": rng.choice([1, 2, 8]),
        "split": rng.choice([4096, 1 << 20]),
    }
