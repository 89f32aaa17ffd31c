"""Threads that share one model get the tokens that one after another would get."""

import threading
import time

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from mlx_lm.generate import generate_step

from glm_fused import reference_path
from glm_fused.loader import load_model
from glm_fused.streaming.options import StreamOptions

pytestmark = pytest.mark.usefixtures("several_threads")

TOP_K = 2
PROMPTS = ([3, 5, 7, 9, 11, 200, 31, 44, 50, 61], [9, 8, 7], list(range(100, 140)), [1])
STEPS = 10
# Some banks leave a thread without slots while another computes, and some have room.
BANKS = [
    pytest.param({"slots": TOP_K}, id="as small as can be"),
    pytest.param({"slots": 3}, id="3"),
    pytest.param({"slots": 4, "spares": 1}, id="lookahead"),
    pytest.param({"slots": 8, "policy": "lru", "direct": True}, id="all"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("threads")
    config = tiny_config(eos_token_id=None)
    write_checkpoint(path, config, quantization={"group_size": 32, "bits": 4}, shards=2)
    return path


def streamed(folder, **options):
    options = StreamOptions(budget=8 << 30, patience=20.0, **options)
    return load_model(folder, stream=options)[0]


def generate(model, prompt, steps=STEPS):
    tokens = mx.array(prompt)
    cache = model.make_cache()
    return [t for t, _ in generate_step(tokens, model, max_tokens=steps, prompt_cache=cache)]


@pytest.fixture(scope="module")
def expected(folder):
    model, _ = load_model(folder)
    return [generate(model, prompt) for prompt in PROMPTS]


def together(jobs):
    """The results of ``jobs``, each in a thread of its own, started at once."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(i):
        try:
            barrier.wait()
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def check(model, expected, threads, runs):
    for i in range(runs):
        numbers = [(i + j) % len(PROMPTS) for j in range(threads)]
        found = together([lambda n=n: generate(model, PROMPTS[n]) for n in numbers])
        assert found == [expected[n] for n in numbers], f"run {i}"


RUNS = [pytest.param(2, id="few"), pytest.param(100, id="100", marks=pytest.mark.slow)]


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("options", BANKS)
def test_threads_on_one_streamed_model(folder, expected, options, threads, runs):
    check(streamed(folder, **options), expected, threads, runs)


@pytest.mark.parametrize("runs", RUNS)
def test_threads_on_one_resident_model(folder, expected, runs):
    check(load_model(folder)[0], expected, 4, runs)


def test_threads_on_the_reference_path(folder, expected):
    model = streamed(folder, slots=TOP_K)

    def job(number):
        with reference_path():
            return generate(model, PROMPTS[number], 3)

    found = together([lambda n=n: job(n) for n in (0, 1, 2)])
    assert found == [tokens[:3] for tokens in expected[:3]]


def test_graphs_that_are_dropped_disturb_nobody(folder, expected):
    """They are dropped unevaluated, or evaluated and not waited for."""
    model, over = streamed(folder, slots=TOP_K), threading.Event()

    def drop():
        dropped = 0
        while not over.is_set():
            logits = model(mx.array([[dropped % 200, 5]]))
            if dropped % 2:
                mx.async_eval(logits)
            del logits
            dropped += 1
        return dropped

    def work():
        try:
            return [generate(model, prompt) for prompt in PROMPTS]
        finally:
            over.set()

    dropped, found = together([drop, work])
    assert dropped > 3
    assert found == expected


def test_a_thread_that_never_evaluates_holds_up_nobody(folder, expected):
    """It leases slots for experts and then stops; nobody waits for it."""
    model = streamed(folder, slots=TOP_K)
    bank = next(iter(model.streaming.banks.values()))
    leased, over = threading.Event(), threading.Event()

    def stop():
        from glm_fused import _ext

        use = _ext.SlotUse(bank, _ext.SlotReads())
        pending, started = use.resolve(mx.array([[6, 7]], mx.int32))
        mx.eval(started)
        leased.set()
        over.wait(60)
        return pending.shape

    def work():
        leased.wait(60)
        start = time.monotonic()
        try:
            return generate(model, PROMPTS[0]), time.monotonic() - start
        finally:
            over.set()

    shape, (found, seconds) = together([stop, work])
    assert (shape, found) == ((1, 2), expected[0])
    assert seconds < 15  # it did not wait as long as the bank's patience


def test_a_graph_of_another_thread_is_an_error(folder, expected):
    """MLX evaluates a node in the thread that made it alone; the model is as good as before."""
    model = streamed(folder, slots=TOP_K)
    (logits,) = together([lambda: model(mx.array([[5, 6]]))])
    with pytest.raises(RuntimeError, match="no Stream"):
        mx.eval(logits)
    assert generate(model, PROMPTS[0]) == expected[0]
    with pytest.raises(RuntimeError, match="no Stream"):
        mx.eval(logits)
    del logits
    assert together([lambda: generate(model, PROMPTS[1])]) == expected[1:2]
