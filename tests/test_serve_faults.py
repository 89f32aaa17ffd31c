"""Schemas, disks and weights that fail: a request pays at most, and the server goes on."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import llguidance
import pytest
from served import served

from glm_fused import Engine, EngineOptions
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.serve import grammar

CODE = "def total(values):\n    result = 0\n    for value in values:\n" * 12
USER = [{"role": "user", "content": "hi"}]
COSTLY = {"type": "string", "pattern": "^.*[ -~].{900}0$"}  # each character may be the one
CHEAP = {"type": "string", "pattern": "^a{3}$"}


def chat(schema):
    described = {"name": "text", "schema": schema}
    form = {"type": "json_schema", "json_schema": described}
    return {"messages": USER, "max_tokens": 2000, "response_format": form}


def tool(schema):
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    function = {"name": "f", "parameters": parameters}
    required = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    return {"messages": USER, "max_tokens": 2000, **required}


def messages(schema):
    form = {"format": {"type": "json_schema", "schema": schema}}
    return {"messages": USER, "max_tokens": 2000, "output_config": form}


def responses(schema):
    form = {"format": {"type": "json_schema", "name": "text", "schema": schema}}
    return {"input": "hi", "max_output_tokens": 2000, "text": form}


APIS = {
    "chat": ("/v1/chat/completions", chat),
    "tool": ("/v1/chat/completions", tool),
    "messages": ("/v1/messages", messages),
    "responses": ("/v1/responses", responses),
}


def last_event(raw):
    """The last document of a stream of events that was read to its end."""
    documents = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    return documents[-1] if documents[-1] == "[DONE]" else json.loads(documents[-1])


@pytest.mark.parametrize("api", APIS)
def test_a_schema_that_is_found_too_costly_midway_is_the_requests_fault(server, api, monkeypatch):
    limits = llguidance.LLParserLimits(step_lexer_fuel=10_000, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    path, body = APIS[api]
    fields = {"model": "demo", "temperature": 0}
    status, found = server.post(path, fields | body(COSTLY))
    assert status == 400, found
    assert found["error"]["type"] == "invalid_request_error"
    assert "The answer cannot go on as its schema" in found["error"]["message"]
    status, _, raw = server.request("POST", path, fields | body(COSTLY) | {"stream": True})
    event = last_event(raw)
    if api == "responses":
        assert event["type"] == "response.failed"
        assert event["response"]["error"]["code"] == "invalid_prompt"
        assert "cannot go on" in event["response"]["error"]["message"]
    else:
        assert status == 200 and event["error"] == found["error"]
    server.idle()
    status, found = server.post(path, fields | body(CHEAP))  # the control
    assert status == 200, found
    assert '"aaa"' in json.dumps(found).replace("\\", "")


def complete(server, prompt, **fields):
    """Text, and how many tokens of the prompt were at hand, of one request."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0} | fields
    status, found = server.post("/v1/completions", body)
    assert status == 200, found
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["text"], cached


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_costs_no_request(engine, tmp_path, monkeypatch, caplog, code):
    """Neither when prompts are written nor when they are read; and when it works again, so does
    what is kept on it."""
    expected = engine.generate(CODE, raw=True, max_tokens=8, temp=0).text
    tokens = len(engine.encode(CODE, raw=True))

    def fails(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    def serves(*cached, broken=()):
        """On the same folder, with so many tokens of each prompt at hand."""
        with (
            monkeypatch.context() as patch,
            served(storing, prompt_cache_dir=str(tmp_path)) as server,
        ):
            for target, name in broken:
                patch.setattr(target, name, fails)
            for count in cached:
                assert complete(server, CODE) == (expected, count)
            assert server.get("/health")[0] == 200
            server.service.close()

    whole, options = tokens - 1, EngineOptions(prompt_cache="64MiB")
    with (
        Engine("demo", options) as storing,
        caplog.at_level(logging.WARNING, logger="glm_fused"),
    ):
        serves(0, whole, broken=[(os, "fsync")])  # memory has it
        assert "is not saved" in caplog.text and os.strerror(code) in caplog.text
        assert not list(tmp_path.glob("*.safetensors*"))
        serves(0)  # and so nothing outlasted the server
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        caplog.clear()
        serves(0, whole, broken=[(Path, "read_bytes"), (Path, "unlink")])
        assert "is not used" in caplog.text and "cannot be deleted" in caplog.text
        caplog.clear()
        serves(whole)
        assert not caplog.records


@pytest.fixture
def copied(tmp_path):
    """The file of the bundled model's weights, in a folder of its own."""
    shutil.copytree(Checkpoint.open("demo").path, tmp_path / "demo")
    return tmp_path / "demo" / "model.safetensors"


def test_an_expert_that_cannot_be_read_ends_its_request_alone(engine, copied, caplog):
    """With an error that says so, in each API's shape; once it can be read, all is well."""
    data, status = copied.read_bytes(), copied.stat()
    body = {"model": "demo", "messages": USER, "max_tokens": 8}
    with (
        Engine(copied.parent, EngineOptions(slots=4, context=2048)) as streamed,
        served(streamed) as server,
    ):
        expected = [engine.generate(text, raw=True, max_tokens=8, temp=0).text for text in "ab"]
        assert complete(server, "a")[0] == expected[0]
        os.truncate(copied, len(data) // 2)
        found, error = server.post("/v1/chat/completions", body)
        assert (found, error["error"]["code"]) == (500, "weights_not_read")
        found, error = server.post("/v1/messages", body)
        assert (found, error["error"]["type"]) == (500, "api_error")
        _, _, raw = server.request("POST", "/v1/messages", body | {"stream": True})
        assert last_event(raw) == error
        assert "Weights of an expert could not be read" in error["error"]["message"]
        assert str(copied) in caplog.text and str(copied) not in json.dumps(error)
        assert "Traceback" not in caplog.text
        server.idle()
        assert server.service.scheduler.describe()["failed"] == 3
        assert server.get("/health")[0] == 200
        copied.write_bytes(data)
        os.utime(copied, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert [complete(server, text)[0] for text in "ab"] == expected
