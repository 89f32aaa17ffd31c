"""Whatever happens between two decode steps, the next has the bits of the layers one by one."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from decode_steps import Between, load_tiny
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import CacheList, load_prompt_cache, save_prompt_cache, trim_prompt_cache

from glm_fused import _ext
from glm_fused.models import decode_step

Decoding = _ext.Decoding
KINDS = [("auto", False), ("auto", True), ("fp8", True), ("int8", False), ("fp32", True)]


@pytest.fixture(autouse=True)
def on_a_cpu():
    if mx.default_device() != mx.cpu:
        pytest.skip("recorded steps are a CPU's")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tiny"))


def scaled_in_place(it, tmp_path):
    it.model.layers[2].self_attn.q_a_layernorm.weight *= 1.5


def a_row_in_place(it, tmp_path):
    it.model.model.embed_tokens.scales[9] = 3


def updated(it, tmp_path):
    it.model.update(tree_map(lambda a: a * 1.25 if a.ndim == 1 else a, it.model.parameters()))


def loaded_again(it, tmp_path):
    weights = tree_flatten(it.model.parameters())
    it.model.load_weights([(name, w * 2 if "norm" in name else w) for name, w in weights])


def another_layer(it, tmp_path):
    it.model.model.layers[2] = layer = copy.deepcopy(it.model.layers[2])
    layer.input_layernorm.weight = layer.input_layernorm.weight * 2


def another_head_of_a_shallow_copy(it, tmp_path):
    it.model, head = copy.copy(it.model), copy.copy(it.model.lm_head)
    head.scales = head.scales * 2
    it.model.lm_head = head


WEIGHTS = [
    scaled_in_place, a_row_in_place, updated, loaded_again, another_layer,
    another_head_of_a_shallow_copy,
]  # fmt: skip


def trimmed(it, tmp_path):
    assert trim_prompt_cache(it.cache, 2) == 2


def trimmed_to_few(it, tmp_path):
    trim_prompt_cache(it.cache, it.cache[0][0].offset - 3)


def another_cache(it, tmp_path):
    it.cache = it.model.make_cache()
    mx.eval(it.step(*range(30)))


def a_cache_with_no_more_than_a_token(it, tmp_path):
    it.cache = it.model.make_cache()
    it.step(3)


def a_prompt(it, tmp_path):
    it.step(*range(40))


def several_tokens(it, tmp_path):
    it.step(1, 2, 3)


def rolled_back(it, tmp_path):
    it.step(1, 2, 3)
    trim_prompt_cache(it.cache, 2)


def rolled_back_on_a_copy(it, tmp_path):
    kept = copy.deepcopy(it.cache)
    mx.eval(it.step(1, 2, 3))
    it.cache = kept


SIZES = [
    trimmed, trimmed_to_few, another_cache, a_cache_with_no_more_than_a_token, a_prompt,
    several_tokens, rolled_back, rolled_back_on_a_copy,
]  # fmt: skip


def copied(it, tmp_path):
    it.cache = copy.deepcopy(it.cache)


def a_copy_went_on(it, tmp_path):
    other = copy.deepcopy(it.cache)
    it.model(mx.array([[5]] * it.batch), other)


def a_shallow_copy_went_on(it, tmp_path):
    entries = [list(map(copy.copy, layer.caches)) for layer in it.cache]
    it.model(mx.array([[5]] * it.batch), [CacheList(*layer) for layer in entries])


def keys_replaced(it, tmp_path):
    for entry in it.entries[1:3]:
        entry.keys = mx.array(entry.keys)


def keys_in_place(it, tmp_path):
    for entry in it.entries:
        entry.keys[..., 3:5, :] = entry.keys[..., 8:10, :]


def keys_cut_to_length(it, tmp_path):
    for entry in it.entries:
        entry.keys, entry.values = entry.state[0], entry.state[1]


def keys_elsewhere(it, tmp_path):
    """In memory whose rows do not follow one another."""
    for entry in it.entries:
        twice = mx.concatenate([entry.keys, entry.keys], axis=-1)
        entry.keys = twice[..., : entry.keys.shape[-1]]


def saved(it, tmp_path):
    save_prompt_cache(str(tmp_path / "cache.safetensors"), it.cache)
    it.cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))


CONTENTS = [
    copied, a_copy_went_on, a_shallow_copy_went_on, keys_replaced, keys_in_place,
    keys_cut_to_length, keys_elsewhere, saved,
]  # fmt: skip


@pytest.mark.parametrize(("kv_format", "pending"), KINDS)
@pytest.mark.parametrize("change", [*WEIGHTS, *SIZES, *CONTENTS])
def test_a_change_between_steps(loaded, tmp_path, change, kv_format, pending):
    it = Between(loaded, kv_format, pending=pending)
    change(it, tmp_path)
    for token in (9, 11):
        it.check(token)
    change(it, tmp_path)
    it.check(1, 2, 3)


@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_that_nobody_compares_are_caught(loaded, tmp_path, monkeypatch, change):
    """The control of the test above, for what steps hold."""
    monkeypatch.setattr(decode_step.Parts, "are_in_place", lambda *_: True)
    with pytest.raises(AssertionError):
        test_a_change_between_steps(loaded, tmp_path, change, "auto", False)


@pytest.mark.parametrize("change", SIZES)
def test_stale_counts_of_rows_are_caught(loaded, tmp_path, monkeypatch, change):
    """The control of the test above, for what a step is told."""
    filled = []

    class Stale:
        def __init__(self, *args):
            self.decoding = Decoding(*args)

        def __call__(self, tokens, cache, given, embedded=None):
            entries = [entry for layer in cache for entry in layer.caches]
            for entry in entries if filled else ():
                entry.offset = filled[-1]
            filled.append(entries[0].offset + tokens.shape[1])
            return self.decoding(tokens, cache, given, embedded)

    monkeypatch.setattr(_ext, "Decoding", Stale)
    with pytest.raises((AssertionError, ValueError)):
        test_a_change_between_steps(loaded, tmp_path, change, "auto", False)


def of_one_row(it):
    """The caches of the first row alone."""
    for layer in it.cache:
        layer.filter([0])
    it.batch = 1


def of_a_row_more(it):
    other = Between(it.model, it.model.kv_format, rows=9, batch=1)
    for layer, more in zip(it.cache, other.cache, strict=True):
        layer.extend(more)
    it.batch += 1


def of_rows_in_another_order(it):
    for layer in it.cache:
        layer.filter([1, 0])


def of_other_padding(it):
    for entry in it.entries:
        entry.left_padding = entry.left_padding + 1


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
@pytest.mark.parametrize(
    "change", [of_one_row, of_a_row_more, of_rows_in_another_order, of_other_padding]
)
def test_a_batch_that_changes(loaded, change, kv_format):
    it = Between(loaded, kv_format, batch=2)
    for token in (9, 11):
        it.check(token)
    change(it)
    for token in (13, 15):
        it.check(token)
