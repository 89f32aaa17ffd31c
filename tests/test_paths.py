"""The path taken is the keyword's, else the context manager's, else the environment's."""

import logging
import threading

import pytest

from glm_fused.environment import debug
from glm_fused.ops.paths import reference_path, use_reference

VARIABLE = "GLM_FUSED_REFERENCE"


@pytest.mark.parametrize("word", ["", "0", "false", "off", "no", "False", "OFF", " No "])
def test_falsy_words(monkeypatch, word):
    monkeypatch.setenv(VARIABLE, word)
    assert not use_reference()


@pytest.mark.parametrize("word", ["1", "true", "on", "yes", "2"])
def test_truthy_words(monkeypatch, word):
    monkeypatch.setenv(VARIABLE, word)
    assert use_reference()


def test_unset_is_fused(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not use_reference()


@pytest.mark.parametrize("environment", ["0", "1"])
@pytest.mark.parametrize("outer", [False, True])
def test_precedence(monkeypatch, environment, outer):
    monkeypatch.setenv(VARIABLE, environment)
    with reference_path(outer):
        assert use_reference() is outer
        assert use_reference(not outer) is not outer
        with reference_path(not outer):
            assert use_reference() is not outer
        assert use_reference() is outer
    assert use_reference() is (environment == "1")


def test_an_exception_restores_the_path(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(KeyError), reference_path():
        raise KeyError
    assert not use_reference()


def test_threads_choose_for_themselves(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    seen = []
    with reference_path():
        thread = threading.Thread(target=lambda: seen.append(use_reference()))
        thread.start()
        thread.join()
    assert seen == [False]


@pytest.mark.parametrize("word", ["1", "0"])
def test_debug_speaks_only_when_asked(monkeypatch, caplog, word):
    monkeypatch.setenv("GLM_FUSED_DEBUG", word)
    with caplog.at_level(logging.DEBUG, logger="glm_fused"):
        debug("layer %d", 3)
    assert ("layer 3" in caplog.text) is (word == "1")
