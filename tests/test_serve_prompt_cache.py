"""A request that begins as one before it takes only its new tokens, after a restart, too."""

import pytest
from tests.served import served

from glm_fused import Engine, EngineOptions

CODE = "def total(values):\n    result = 0\n    for value in values:\n" * 30


def complete(server, prompt, **options):
    body = {"model": "demo", "prompt": prompt, "max_tokens": 40, "temperature": 0} | options
    status, found = server.post("/v1/completions", body)
    assert status == 200, found
    usage = found["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["text"], usage["prompt_tokens"], cached


@pytest.fixture
def alone(engine):
    return lambda prompt: engine.generate(prompt, raw=True, max_tokens=40, temp=0).text


@pytest.mark.parametrize("draft", ["off", "auto", 3])
def test_a_second_turn_takes_only_its_new_tokens(alone, draft):
    options = EngineOptions(prompt_cache="64MiB", draft=draft)
    with Engine("demo", options) as caching, served(caching) as server:
        first, size, cached = complete(server, CODE)
        assert (first, cached) == (alone(CODE), 0)
        turn = CODE + first + "\n\nclass Total:\n"
        second, longer, cached = complete(server, turn)
        assert second == alone(turn)
        assert size <= cached < longer
        before = server.service.scheduler.describe()["prompt_tokens"]
        again, _, cached = complete(server, turn)
        assert again == second
        assert cached >= longer - 2
        server.idle()
        assert server.service.scheduler.describe()["prompt_tokens"] - before <= 2
        other = "x" + turn  # nothing that it begins with was there
        assert complete(server, other)[::2] == (alone(other), 0)
        found = server.get("/stats")[1]["prompt_cache"]
        assert found["hits"] >= 2


def test_a_folder_outlasts_the_server(alone, tmp_path):
    with Engine("demo", EngineOptions(prompt_cache="64MiB")) as caching:
        for turn in range(2):
            with served(caching, prompt_cache_dir=str(tmp_path)) as server:
                text, size, cached = complete(server, CODE)
                assert text == alone(CODE)
                assert cached == (0 if turn == 0 else size - 1)


def test_without_a_cache_nothing_is_kept(alone, server):
    for _ in range(2):
        assert complete(server, CODE)[::2] == (alone(CODE), 0)
    assert server.get("/stats")[1]["prompt_cache"] is None


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Engine("demo", EngineOptions(prompt_cache="64MiB")) as engine,
        pytest.raises(ValueError, match="file cannot be a folder of prompts: File exists"),
        served(engine, prompt_cache_dir=str(tmp_path / "file")),
    ):
        pass
