"""Decode steps that are interrupted, fail, change threads or outlive their model."""

from __future__ import annotations

import copy
import gc
import signal
import threading
import time
from collections import Counter
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest
from decode_steps import Between, load_tiny
from formats_under_test import assert_same_bits
from mlx_lm.models.cache import trim_prompt_cache

import glm_fused
from glm_fused import reference_path

pytestmark = pytest.mark.usefixtures("several_threads")


@pytest.fixture(autouse=True)
def on_a_cpu():
    if mx.default_device() != mx.cpu:
        pytest.skip("recorded steps are a CPU's")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def threads():
    before = glm_fused.num_threads()
    yield
    glm_fused.set_num_threads(before)


def test_what_runs_a_step_changes_before_it_is_evaluated(loaded, threads):
    it, other = Between(loaded), Between(loaded)
    with reference_path():
        expected = [other.step(token) for token in range(8)]
        mx.eval(expected)
    found = []
    for n in (1, 3, 8, 2):
        found.append(it.step(len(found)))
        glm_fused.set_num_threads(n)
        mx.async_eval(found[-1])
    for where in (mx.stream(mx.new_stream(mx.cpu)), reference_path()):
        found.append(it.step(len(found)))
        with where:
            mx.async_eval(found[-1])
            found.append(it.step(len(found)))
            mx.async_eval(found[-1])
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def test_a_step_outlives_its_model_and_cache(loaded):
    it = Between(loaded)
    kept = copy.deepcopy(it.cache)
    found = it.step(9)
    with reference_path():
        expected = it.model(mx.array([[9]]), kept)
        mx.eval(expected)
    del it, kept
    gc.collect()
    mx.clear_cache()
    assert_same_bits(found, expected)


def test_a_token_that_turns_out_wrong_spoils_its_cache_alone(loaded):
    """One that is computed is checked with the step, on whose end the cache has to wait."""
    it = Between(loaded)
    kept = copy.deepcopy(it.cache)
    logits = it.model(mx.array([[9000]]) * mx.array([[1]]), it.cache)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tokens must be from 0 to 255.* is 9000"):
            mx.eval(logits)
        trim_prompt_cache(it.cache, 1)
        logits = it.step(9)
    it.cache = kept
    it.check(9)


def interrupted(call, seconds):
    """Run a call that Ctrl-C ends after so many seconds, if it takes as long."""
    running = True

    def interrupt(*_):
        if running:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            call()
            running = False
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def moments(call, rng, ended):
    """Random seconds within a call, 60 or, until each of `ended` is more than 0, up to 2,000."""
    began = time.perf_counter()
    call()
    took = time.perf_counter() - began
    for turn in range(2000):
        if turn >= 60 and all(ended.values()):
            break
        yield rng.uniform(0, 1.2 * took)


def new_weights(it):
    it.model.layers[0].input_layernorm.weight *= 1


@pytest.mark.parametrize("before", [lambda it: None, new_weights])
def test_an_interrupted_step_is_taken_or_not(loaded, before):
    """Ctrl-C may come while a step is recorded: the cache has its rows, or is as it was."""
    it = Between(loaded)
    sound, rng, ended = it.cache, np.random.default_rng(1), Counter({(): 0, (9,): 0})

    def steps():
        it.step(9)
        it.step(11, 13)

    before(it)
    it.cache = copy.deepcopy(sound)
    for seconds in moments(steps, rng, ended):
        it.cache, kept = copy.deepcopy(sound), copy.deepcopy(sound)
        before(it)
        interrupted(steps, seconds)
        (filled,) = {entry.offset for entry in it.entries}
        taken = (9, 11, 13)[: filled - kept[0][0].offset]
        ended[taken] += 1
        with reference_path():
            for tokens in filter(None, (taken[:1], taken[1:])):
                it.model(mx.array([tokens]), kept)
            expected = it.model(mx.array([[15]]), kept)
            mx.eval(expected)
        assert_same_bits(it.step(15), expected)
    assert all(ended.values()), ended


def test_an_interrupted_prompt_is_taken_or_an_error(loaded):
    """It goes through layer after layer, of which some may have its rows."""
    it, ended = Between(loaded), Counter({"whole": 0, "an error": 0})
    sound, rng = it.cache, np.random.default_rng(1)
    prompt = rng.integers(0, 250, 40).tolist()
    it.cache = copy.deepcopy(sound)
    for seconds in moments(lambda: it.step(*prompt), rng, ended):
        it.cache = copy.deepcopy(sound)
        interrupted(lambda: it.step(*prompt), seconds)
        if len({entry.offset for entry in it.entries}) == 1:
            ended["whole"] += 1
            it.check(15)
        else:
            ended["an error"] += 1
            with pytest.raises(ValueError, match=r"\[cache\] layer \d+, .*: found "):
                it.step(15)
    assert all(ended.values()), ended


def test_threads_that_come_and_go(loaded):
    """Each has streams of its own, and caches that are trimmed, copied and left."""
    model, results = copy.deepcopy(loaded), {}

    def decode(number, seed):
        with mx.stream(mx.new_thread_local_stream(mx.cpu)):
            rng = np.random.default_rng(seed)
            cache, found = model.make_cache(), []
            model(mx.array(rng.integers(0, 250, (1, 12))), cache)
            for _ in range(12):
                kept = copy.deepcopy(cache)
                logits = model(mx.array(rng.integers(0, 250, (1, rng.integers(1, 3)))), cache)
                found.append(logits[:, -1])
                if rng.random() < 0.3:
                    cache = kept
                elif rng.random() < 0.3:
                    trim_prompt_cache(cache, 2)
            found = mx.concatenate(found)
            mx.eval(found)
            results[number] = np.array(found.view(mx.uint16))

    for seed in range(3):
        decode(("alone", seed), seed)
    for turn in range(6):
        running = [threading.Thread(target=decode, args=((turn, s), s)) for s in range(3)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for seed in range(3):
            assert np.array_equal(results[turn, seed], results["alone", seed])
