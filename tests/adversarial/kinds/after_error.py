"""After a read failed, nothing that it left behind passes for a result."""

import copy
import random
import threading
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds import _preload, slots
from tests.adversarial.kinds._streamed import Fixture, check, random_options

from glm_fused import _ext
from glm_fused.host import settle

NAME = "after_error"
QUICK_CASES = 40
SLOW_CASES = 1000
TIMEOUT = 60.0
STEPS = 4
unavailable, environment = slots.unavailable, slots.environment
_state = {}


def prepare(folder):
    """Make a tiny model."""
    _state["fixture"], _state["reads"] = Fixture(folder), _preload.Reads()


class Generation:
    """A greedy generation, step by step, that keeps all arrays that it gets."""

    def __init__(self, model, prompt, ahead):
        self.model, self.prompt, self.ahead = model, prompt, ahead
        self.cache, self.tokens, self.arrays = model.make_cache(), [], []
        self.error = None

    def start(self):
        """Take the prompt in chunks, as mlx-lm does."""
        y, last = mx.array(self.prompt.tokens[:-1]), mx.array(self.prompt.tokens[-1:])
        for chunk in [y[i : i + self.prompt.chunk] for i in range(0, y.size, self.prompt.chunk)]:
            self.model(chunk[None], self.cache)
            mx.eval([c.state for c in self.cache])
        self.following = self.build(last)

    def build(self, y):
        """The token after ``y``, not yet evaluated."""
        logits = self.model(y[None], self.cache)[:, -1, :]
        logits = (logits - mx.logsumexp(logits, keepdims=True)).squeeze(0)
        self.arrays.append(logits)
        y = mx.argmax(logits, axis=-1, keepdims=True)
        if self.ahead:
            mx.async_eval(y, logits)
        return y

    def step(self):
        """Generate one more token."""
        y = self.following
        if len(self.tokens) + 1 < STEPS:
            self.following = self.build(y)
        token = y.item()
        self.tokens.append(token)

    def advance(self, part):
        """Do a part, `start` or `step`, unless one failed before."""
        if self.error is None:
            try:
                part(self)
            except RuntimeError as error:
                self.error = error

    def check(self):
        """Raise `Wrong` unless all tokens and arrays are right, or of no use to anybody."""
        if tuple(self.tokens) != self.prompt.expected[: len(self.tokens)]:
            raise Wrong(f"tokens {self.tokens}, expected {self.prompt.expected}, {self.error}")
        for i, (found, expected) in enumerate(zip(self.arrays, self.prompt.logits, strict=False)):
            try:
                same, lost = mx.array_equal(found, expected).item(), mx.isnan(found).all().item()
            except RuntimeError:
                continue
            if not (same or lost):
                raise Wrong(f"after {self.error} the logits of step {i} are those of no model")
        if self.error is not None and self.lost:
            self.check_cache(self.cache)
            self.check_cache(copy.deepcopy(self.cache))

    @property
    def lost(self):
        """Whether a read failed for this one; else the error was another's."""
        return bool(self.cache[0]._reads.error)

    def check_cache(self, cache):
        """Raise `Wrong` if the model goes on from this cache."""
        try:
            mx.eval(self.model(mx.array([[5]]), cache))
        except RuntimeError as error:
            if "of no use" in str(error):
                return
            raise
        raise Wrong(f"after {self.error} the same cache is accepted")


def run(model, prompts, rng):
    """Run some generations side by side in one thread, then check all of them."""
    both = [Generation(model, prompt, rng.random() < 0.7) for prompt in prompts]
    for part in [Generation.start] + [Generation.step] * STEPS:
        for one in both:
            one.advance(part)
    hits = _state["reads"].hits
    _state["reads"].disarm()
    settle(mx.default_stream(mx.cpu))
    errors = [one.error for one in both if one.error is not None]
    for error in errors:
        if clear_error(error) is None:
            raise error
    if errors and not hits:
        raise Wrong(f"no read failed, but {errors[0]}")
    for one in both:
        one.check()
    settle(mx.default_stream(mx.cpu))
    # The arrays of what failed are still alive here.
    check(model, rng.choice(prompts), 2)
    return f"error: {errors[0]}" if errors else "right"


def case(seed, folder):
    """Run generations in the main thread or another, while reads fail for them."""
    rng = random.Random(seed)
    model = _state["fixture"].model(**random_options(rng))
    prompts = rng.sample(_state["fixture"].prompts, rng.choice([1, 1, 2, 3]))
    outcome = []

    def body():
        try:
            outcome.append(run(model, prompts, rng))
        except BaseException as error:
            outcome.append(error)

    count = rng.choice([1, 1, 3, 1000])
    _state["reads"].arm(_preload.ERROR, rng.randrange(60), count)
    if rng.random() < 0.5:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    else:
        body()
    _state["reads"].disarm()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@contextmanager
def planted():
    """Nobody looks at what became of the reads."""
    healthy = mock.Mock(side_effect=lambda cache: _ext.SlotReads())
    with (
        mock.patch("glm_fused.streaming.experts.check_reads", healthy),
        mock.patch.object(Generation, "lost", True),
    ):
        yield
