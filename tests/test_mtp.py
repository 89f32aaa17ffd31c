"""The MTP layer: its logits are plain NumPy's, and its bits do not depend on how it is called."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_tensors, tiny_config, write_checkpoint
from formats_under_test import assert_same_bits
from mlx_lm.models.cache import BatchKVCache, CacheList
from mtp_oracle import Oracle

from glm_fused import reference_path
from glm_fused.loader import load_model
from glm_fused.models import decode_step
from glm_fused.models.cache import trim

TOPK = 16
VECTORS = Path(__file__).parent / "vectors"
AFFINE_4 = {"group_size": 32, "bits": 4}
FORMATS = ["auto", "fp8", "int8", "fp32"]


def config_of(dense=False, **overrides):
    config = tiny_config(index_topk=TOPK, **overrides)
    if dense:  # JSON's null, which `tiny_config` would leave out
        config |= {"n_routed_experts": None, "first_k_dense_replace": 9}
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One in bfloat16 and four bits, which shares the first draft's selection."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("tiny"),
        config_of(),
        quantization=AFFINE_4,
        mtp=True,
    )
    return load_model(path, mtp=True)[0]


@pytest.fixture(params=FORMATS)
def of_format(model, request):
    model.kv_format = request.param
    yield model
    model.kv_format = "auto"


def some_tokens(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, 250, shape))


def caches(model, padding=None):
    """Caches of the decoder and of the MTP layer, of a batch where there is padding."""
    if padding is None:
        return model.make_cache(), model.make_mtp_cache()
    made = [*model.make_cache(), model.make_mtp_cache()]
    made = [CacheList(*(BatchKVCache(padding) for _ in layer.caches)) for layer in made]
    return made[:-1], made[-1]


def chain(model, token, hidden, cache, drafts):
    """The logits and hidden states of drafts that go on from one another."""
    found, selection = [], None
    for _ in range(drafts):
        logits, hidden, selection = model.draft(token, hidden, cache, selection)
        found += [logits, hidden]
        token = mx.argmax(logits[:, -1:], axis=-1)
        hidden = hidden[:, -1:]
    return found


class Oracles:
    """The oracle's drafts: all rows so far, and the choice that later ones share."""

    def __init__(self, config, tensors):
        self.oracle, self.shares = Oracle(config, tensors), config["index_share_for_mtp_iteration"]

    def chain(self, tokens, hidden, drafts):
        tokens, hidden, choices, logits = list(tokens), hidden, {}, []
        for _ in range(drafts):
            found, states, chosen = self.oracle.rows(tokens, hidden, choices)
            logits.append(found[-1])
            if self.shares and len(tokens) > TOPK:
                choices[len(tokens)] = chosen[-1]
            tokens.append(int(found[-1].argmax()))
            hidden = np.concatenate([hidden, states[-1:]])
        return logits


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("length", [TOPK - 4, 3 * TOPK])
def test_logits_equal_plain_numpy(tmp_path, dense, shares, length):
    """Drafts that go on from one another, of few keys and of more than are selected."""
    config = config_of(dense, index_share_for_mtp_iteration=shares)
    options = {"layout": "hf", "dtype": "float32", "mtp": True}
    model, _ = load_model(write_checkpoint(tmp_path, config, **options), mtp=True)
    tokens = some_tokens(1, length + 1)
    _, hidden = model.states(tokens[:, :-1], model.make_cache())
    found = chain(model, tokens[:, 1:], hidden, model.make_mtp_cache(), 4)[::2]
    oracle = Oracles(config, make_tensors(config, **options))
    expected = oracle.chain(tokens[0, 1:].tolist(), np.array(hidden[0], np.float64), 4)
    for ours, theirs in zip(found, expected, strict=True):
        error = np.abs(np.array(ours[0, -1], np.float64) - theirs).max()
        assert error <= 1e-5 * np.ptp(theirs)


def error_beside_transformers(chunks, shift=0):
    """The largest error of a row's logits, by their spread, with states that many places late."""
    model, _ = load_model(VECTORS / "glm52_mtp", mtp=True)
    expected = mx.load(str(VECTORS / "glm52_mtp" / "expected.safetensors"))
    tokens, hidden = expected["tokens"][:, 1:], mx.roll(expected["hidden"], shift, axis=1)[:, :-1]
    cache, found, at = model.make_mtp_cache(), [], 0
    for count in chunks:
        rows = slice(at, at + count)
        logits, _, selection = model.draft(tokens[:, rows], hidden[:, rows], cache)
        found.append(logits)
        at += count
    assert at == tokens.shape[1]
    chosen = sorted(selection[0, -1].tolist())
    assert shift or chosen == expected["mtp_topk"][-1].tolist()
    ours = np.array(mx.concatenate(found, axis=1)[0], np.float64)
    theirs = np.array(expected["mtp_logits"][0], np.float64)
    return (np.abs(ours - theirs).max(1) / np.ptp(theirs, axis=1)).max()


@pytest.mark.parametrize("chunks", [(207,), (180, *(1,) * 27), (20, 9, 16, 162)], ids=str)
def test_logits_equal_transformers(chunks):
    """Of 207 rows, most of which leave keys out; a step's rows as well as a prompt's."""
    assert error_beside_transformers(chunks) <= 1e-5


def test_the_oracle_agrees_with_transformers():
    """The one in NumPy, which has drafts of drafts besides, that share a selection."""
    folder = VECTORS / "glm52_mtp"
    theirs = {k: np.array(v) for k, v in mx.load(str(folder / "expected.safetensors")).items()}
    config = json.loads((folder / "config.json").read_text())
    oracle = Oracle(config, mx.load(str(folder / "model.safetensors")))
    logits, *_ = oracle.rows(theirs["tokens"][0, 1:], theirs["hidden"][0, :-1].astype(float))
    error = np.abs(logits - theirs["mtp_logits"][0]).max(1)
    assert (error <= 1e-5 * np.ptp(logits, axis=1)).all()


def test_states_of_another_place_are_seen():
    """The control of the test above."""
    assert error_beside_transformers((207,), shift=1) > 1e-2


def test_a_wrong_position_is_seen(tmp_path):
    """The control of the test above: the oracle's rows one position apart give other logits."""
    config = config_of()
    options = {"layout": "hf", "dtype": "float32", "mtp": True}
    model, _ = load_model(write_checkpoint(tmp_path, config, **options), mtp=True)
    tokens = some_tokens(1, 10)
    _, hidden = model.states(tokens)
    logits, *_ = model.draft(tokens[:, :-1], hidden[:, 1:], model.make_mtp_cache())
    oracle = Oracle(config, make_tensors(config, **options))
    theirs, *_ = oracle.rows(tokens[0, 1:].tolist(), np.array(hidden[0, :-1], np.float64))
    assert np.abs(np.array(logits[0], np.float64) - theirs).max() > 1e-2 * np.ptp(theirs)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_states_have_the_bits_of_a_call(of_format, length):
    tokens, (cache, _), (other, _) = some_tokens(1, length), caches(of_format), caches(of_format)
    for _ in range(2):
        logits, hidden = of_format.states(tokens, cache)
        assert_same_bits(logits, of_format(tokens, other))
        assert_same_bits(of_format.head(hidden), logits)


@pytest.mark.parametrize("padding", [None, [3, 0, 1]], ids=["plain", "padded"])
@pytest.mark.parametrize("split", [(48,), (20, 16, 3, 1, 8), (1,) * 24], ids=["once", "some", "1"])
def test_rows_do_not_depend_on_how_many_go_together(of_format, padding, split):
    batch, length = 1 if padding is None else len(padding), sum(split)
    tokens = some_tokens(batch, length + 1)
    cache, drafts = caches(of_format, padding)
    _, hidden = of_format.states(tokens[:, :-1], cache)
    parts, at = [], 0
    for n in split:
        rows = slice(at, at + n)
        parts.append(of_format.draft(tokens[:, 1:][:, rows], hidden[:, rows], drafts)[:2])
        at += n
    with reference_path():
        _, other = caches(of_format, padding)
        expected = of_format.draft(tokens[:, 1:], hidden, other)
    for found, whole in zip(zip(*parts, strict=True), expected[:2], strict=True):
        assert_same_bits(mx.concatenate(found, axis=1), whole)


@pytest.mark.parametrize("padding", [None, [2, 0]], ids=["plain", "padded"])
def test_drafts_after_a_trim_are_those_of_a_fresh_cache(of_format, padding):
    """Rows of drafts that go on from drafts are forgotten, and the right ones take their place."""
    batch = 1 if padding is None else len(padding)
    tokens = some_tokens(batch, 31, seed=1)
    cache, drafts = caches(of_format, padding)
    _, hidden = of_format.states(tokens[:, :-1], cache)
    for at in range(20, 28, 2):
        known = drafts[0].size() if drafts[0].keys is not None else 0
        row = of_format.draft(tokens[:, 1:][:, known:at], hidden[:, known:at], drafts)
        token = mx.argmax(row[0][:, -1:], axis=-1)
        found = chain(of_format, token, row[1][:, -1:], drafts, 3)
        mx.eval(found)
        trim(drafts, 3)
        with reference_path():
            _, fresh = caches(of_format, padding)
            whole = of_format.draft(tokens[:, 1:][:, :at], hidden[:, :at], fresh)
            expected = chain(of_format, token, whole[1][:, -1:], fresh, 3)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(ours, theirs)


def test_drafts_are_recorded_once_for_each_kind(model, monkeypatch):
    """Of few keys, of many with a selection of their own, and with one that is given."""
    fresh, record, recorded = copy.deepcopy(model), decode_step.record, []

    def counted(*args):
        recorded.append(args)
        return record(*args)

    monkeypatch.setattr(decode_step, "record", counted)
    tokens = some_tokens(1, 60)
    cache, drafts = caches(fresh)
    logits, hidden = fresh.states(tokens[:, :4], cache)
    mx.eval(fresh.draft(tokens[:, 1:5], hidden, drafts))
    recorded.clear()
    for at in range(4, 40):
        logits, hidden = fresh.states(tokens[:, at : at + 1], cache)
        mx.eval(logits, chain(fresh, tokens[:, at + 1 : at + 2], hidden, drafts, 3))
        trim(drafts, 2)
        assert fresh._drafts._last
    kinds = [(len(made.given), selects) for _, _, made, _, _, selects in recorded]
    assert sorted(kinds) == [(0, False), (0, True), (1, False), (1, True), (2, True)]


def test_a_selection_that_is_given_is_taken(model):
    """A draft that is given one attends to it, and writes the key that later ones score."""
    tokens = some_tokens(1, 41)
    _, hidden = model.states(tokens[:, :-1], model.make_cache())
    results = []
    for own in (True, False):
        cache = model.make_mtp_cache()
        *_, selection = model.draft(tokens[:, 1:-1], hidden[:, :-1], cache)
        assert selection.shape == (1, 1, TOPK)
        given = None if own else mx.zeros_like(selection)
        logits, _, chosen = model.draft(tokens[:, -1:], hidden[:, -1:], cache, given)
        assert own or not chosen.any().item()
        results.append((logits, cache))
    (own, ours), (given, theirs) = results
    assert not mx.array_equal(own, given)
    for a, b in zip(ours.caches, theirs.caches, strict=True):
        assert_same_bits(a.keys[:, :, :40], b.keys[:, :, :40])


BAD = {
    "float tokens": (lambda t, h, c: (t.astype(mx.float32), h, c), "integer mx.array"),
    "hidden of fewer rows": (lambda t, h, c: (t, h[:, 1:], c), r"hidden is .*\[1, 3, 128\], exp"),
    "hidden of integers": (lambda t, h, c: (t, h.astype(mx.int32), c), "hidden is .*int32"),
    "no hidden": (lambda t, h, c: (t, None, c), "hidden is NoneType, expected floats"),
    "the decoder's cache": (lambda t, h, c: (t, h, c.decoder[2]), "layer 5 is 'full' and needs"),
    "a selection of floats": (
        lambda t, h, c: (t, h, c.mtp, mx.zeros((1, 4, 2))), r"selection is .*expected int32 \[1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_drafts_cannot_be_made_of(model, change, message):
    class Caches:
        decoder, mtp = caches(model)

    tokens = some_tokens(1, 4)
    _, hidden = model.states(tokens)
    given = change(tokens, hidden, Caches)
    given = tuple(Caches.mtp if part is Caches else part for part in given)
    with pytest.raises(ValueError, match=message):
        model.draft(*given)


def test_models_without_the_layer_say_so(tmp_path):
    path = write_checkpoint(tmp_path, tiny_config())
    with pytest.raises(ValueError, match=r"no tensor begins with model\.layers\.5\."):
        load_model(path, mtp=True)
    none = write_checkpoint(tmp_path / "none", tiny_config(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="num_nextn_predict_layers must be at least 1"):
        load_model(none, mtp=True)
    model, _ = load_model(path)
    with pytest.raises(ValueError, match="no MTP layer; load it with mtp=True"):
        model.draft(some_tokens(1, 1), mx.zeros((1, 1, 128)), model.make_cache()[0])


def test_more_columns_than_there_are_cannot_be_forgotten(model):
    cache = model.make_cache()
    model(some_tokens(1, 5), cache)
    trim(cache, 2)
    assert {entry.offset for layer in cache for entry in layer.caches} == {3}
    with pytest.raises(ValueError, match="cannot forget 4 columns, expected 0 to 3"):
        trim(cache, 4)
