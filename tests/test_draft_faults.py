"""Faults that are planted where drafts share what the indexer chose are found, on any path."""

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from test_drafters import check_rows
from test_drafts import CODE, Planted, decode, kept, same

from glm_fused import Engine, reference_path
from glm_fused.generation.decoding import Decoding, Drafting
from glm_fused.generation.drafts.depth import Depth
from glm_fused.loader import load_model
from glm_fused.models.attention import Attention
from glm_fused.models.indexer import Indexer

TOPK = 16


@pytest.fixture
def takes_the_selection_before(monkeypatch):
    """Each draft that is checked attends to what the token before it does: not to its own key."""
    select, drafted, checking = Indexer.select, Decoding._drafted, []

    def late(self, *given):
        found = select(self, *given)
        return mx.concatenate([found[:, :1], found[:, :-1]], axis=1) if checking else found

    def checked(self, plan):
        checking.append(plan)
        try:
            return drafted(self, plan)
        finally:
            checking.pop()

    monkeypatch.setattr(Indexer, "select", late)
    monkeypatch.setattr(Decoding, "_drafted", checked)


@pytest.fixture
def writes_no_key(monkeypatch):
    """A draft that is given a selection leaves out the key that later tokens score."""
    call, append, given = Attention.__call__, Indexer.append, []

    def noted(self, x, norm, span, angles, cache=None, selection=None):
        given.append(selection is not None)
        try:
            return call(self, x, norm, span, angles, cache, selection)
        finally:
            given.pop()

    def forgetful(self, keys, cache):
        return keys if given[-1] else append(self, keys, cache)

    monkeypatch.setattr(Attention, "__call__", noted)
    monkeypatch.setattr(Indexer, "append", forgetful)


def drafted_beside_plain():
    """Whether a text with drafts is that without, where the indexer leaves keys out."""
    with Engine("demo") as engine:
        model, prompt = engine.model, engine.encode(CODE * 3, raw=True)
        assert len(prompt) > model.args.index_topk
        plain = decode(model, prompt)
        with reference_path():
            drafted = decode(model, prompt, Drafting(Planted(prompt + plain[0]), Depth(4)))
    assert kept(drafted[2]) > 0
    return same(drafted, plain)


def test_the_reference_path_gives_the_same():
    assert drafted_beside_plain()


def test_a_selection_of_the_token_before_is_found(takes_the_selection_before):
    assert not drafted_beside_plain()


def rows_of_the_layer(folder):
    """Check them in a model that has taken no steps yet."""
    model, _ = load_model(folder, mtp=True)
    with reference_path():
        check_rows(model, 4)


def test_a_reused_selection_without_its_key_is_found(tmp_path, request):
    write_checkpoint(tmp_path, tiny_config(index_topk=TOPK), mtp=True)
    rows_of_the_layer(tmp_path)
    request.getfixturevalue("writes_no_key")
    with pytest.raises(ValueError, match="indexer keys: found length"):
        rows_of_the_layer(tmp_path)
