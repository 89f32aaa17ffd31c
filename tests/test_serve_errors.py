"""Requests that get no answer: what the server says, in the shape of OpenAI's errors."""

import json
import socket
import threading
import time

import pytest
from openai.types import completion_create_params as published_completions
from openai.types.chat import completion_create_params as published_chat
from served import served

from glm_fused.serve import app
from glm_fused.serve.errors import ApiError
from glm_fused.serve.openai_chat_body import ChatBody
from glm_fused.serve.openai_completions import CompletionBody

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(engine):
    with served(engine, max_body_bytes=200_000, timeout=3) as server:
        yield server


def chat(server, **fields):
    return server.post(CHAT, {"model": "demo", "messages": HI, "max_tokens": 2} | fields)


def complete(server, **fields):
    return server.post(COMPLETIONS, {"model": "demo", "prompt": "hi", "max_tokens": 2} | fields)


def still_answers(server):
    status, found = chat(server)
    assert status == 200 and found["usage"]["completion_tokens"] == 2
    return True


def assert_error(answer, status, param, *words):
    assert answer[0] == status, answer
    assert set(answer[1]) == {"error"}
    assert set(answer[1]["error"]) == {"message", "type", "param", "code"}
    assert answer[1]["error"]["param"] == param
    for word in words:
        assert word in answer[1]["error"]["message"], answer[1]["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": "hi"}, "messages", ["found 'hi'", "expected a valid list"]),
        ({"messages": []}, "messages", ["found []", "at least 1 item"]),
        ({"messages": [3]}, "messages[0]", ["found 3"]),
        ({"messages": ["hi"]}, "messages[0]", ["found 'hi'"]),
        ({"messages": None}, "messages", ["found None"]),
        ({"messages": [{"content": "x"}]}, "messages[0].role", ["required"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["required"]),
        (
            {"messages": [{"role": "bob", "content": "x"}]},
            "messages[0].role",
            ["found 'bob'", "'user'", "'assistant'"],
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", ["found 3"]),
        ({"messages": [*HI, {"role": "user", "content": None}]}, "messages[1].content", ["None"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            ["required"],
        ),
        ({"temperature": -1}, "temperature", ["found -1", "at least 0"]),
        ({"temperature": "1"}, "temperature", ["found '1'"]),
        ({"temperature": True}, "temperature", ["found True"]),
        ({"top_p": 0}, "top_p", ["found 0", "above 0"]),
        ({"top_p": 1.5}, "top_p", ["found 1.5"]),
        ({"n": 0}, "n", ["found 0", "greater than or equal to 1"]),
        ({"n": 1.5}, "n", ["found 1.5"]),
        ({"seed": "x"}, "seed", ["found 'x'", "integer"]),
        ({"stop": ""}, "stop", ["found ''"]),
        ({"stop": ["a", 3]}, "stop", ["expected a text or up to 16"]),
        ({"max_tokens": 0}, "max_tokens", ["found 0"]),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", ["one of them"]),
        ({"stream": "yes"}, "stream", ["found 'yes'"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream: true"]),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs: true"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["found 21"]),
        ({"presence_penalty": 0.5}, "presence_penalty", ["found 0.5", "expected 0"]),
        ({"frequency_penalty": -2}, "frequency_penalty", ["repetition_penalty"]),
        ({"logit_bias": {"5": 100}}, "logit_bias", ["expected {}"]),
        ({"functions": [{"name": "f"}]}, "functions", ["tools"]),
        ({"modalities": ["audio"]}, "modalities", ["writes text"]),
        ({"tool_choice": "required"}, "tool_choice", ["needs tools"]),
        ({"tool_choice": "sometimes"}, "tool_choice", ["found 'sometimes'"]),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ["required"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["found 'xml'"]),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", []),
        ({"surprise": 1}, "surprise", ["no such field"]),
        ({"model": None}, "model", ["found None"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_that_does_not_fit_is_named(server, fields, param, words):
    assert_error(chat(server, **fields), 400, param, *words)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": 3}, "prompt", ["found 3", "a text, a list of tokens"]),
        ({"prompt": []}, "prompt", ["found []"]),
        ({"prompt": ["a", 3]}, "prompt", ["found ['a', 3]"]),
        ({"prompt": [[]]}, "prompt", ["not empty"]),
        ({"prompt": [True]}, "prompt", ["found [True]"]),
        ({"prompt": [10**6]}, "prompt", ["token 0 is 1000000", "integer from 0 to"]),
        ({"prompt": [-1]}, "prompt", ["token 0 is -1"]),
        ({"prompt": None}, "prompt", ["found None"]),
        ({"suffix": "end"}, "suffix", ["does not fill gaps"]),
        ({"best_of": 3}, "best_of", ["found 3 with n 1"]),
        ({"prompt": ["x"] * 100, "n": 2}, "n", ["100 prompts with n 2", "at most 128"]),
        ({"logprobs": True}, "logprobs", ["found True"]),
        ({"messages": HI}, "messages", ["no such field"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_of_completions_that_does_not_fit_is_named(server, fields, param, words):
    assert_error(complete(server, **fields), 400, param, *words)


def test_an_empty_prompt_is_refused_or_answered_and_ends_nothing(server):
    for fields in ({"prompt": ""}, {"prompt": [""]}, {"prompt": ["", "x"]}):
        status, found = complete(server, **fields)
        assert status in (200, 400), found
        assert still_answers(server)
    for content in ("", [], [{"type": "text", "text": ""}]):
        status, found = chat(server, messages=[{"role": "user", "content": content}])
        assert status in (200, 400), found
        assert still_answers(server)


def test_another_model_is_not_found_and_not_downloaded(server, monkeypatch):
    def connect(*args):
        raise AssertionError(f"connects to {args}")

    for name in ("gpt-4", "zai-org/GLM-5", "", "demo2", "../demo", "/etc"):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.snapshot_download", connect)
            assert_error(chat(server, model=name), 404, "model", f"model is {name!r}", "demo")
            answer = complete(server, model=name)
        assert_error(answer, 404, "model", "not served here")
        assert answer[1]["error"]["code"] == "model_not_found"


def test_a_prompt_beyond_the_context_is_refused_with_numbers(server, engine):
    context = engine.context
    answer = chat(server, messages=[{"role": "user", "content": "x = 1\n" * context}])
    assert_error(answer, 400, "messages", f"expected 1 to {context - 1}")
    assert answer[1]["error"]["code"] == "context_length_exceeded"
    answer = chat(server, max_tokens=context)
    assert_error(answer, 400, "max_tokens", f"exceed the context of {context} tokens")
    answer = complete(server, prompt=[5] * context)
    assert_error(answer, 400, "prompt", f"{context} tokens")
    assert server.service.max_tokens(context - 4, None) == 4
    assert server.service.max_tokens(context - 4, 4) == 4
    with pytest.raises(ApiError, match="at most 4 more fit"):
        server.service.max_tokens(context - 4, 5)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'"hi"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"model": "\xff"}', "not JSON"),
        (b'{"model": "\\ud800"}', "not JSON"),
        (b'{"temperature": NaN}', "not JSON"),
        (b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object(server, raw, words):
    headers = {"Content-Type": "application/json"}
    status, _, found = server.request("POST", CHAT, raw=raw, headers=headers)
    assert_error((status, found), 400, None, words)


def test_a_body_of_another_type_or_size(server):
    for kind in ({"Content-Type": "text/plain"}, {}, {"Content-Type": "multipart/form-data"}):
        status, _, found = server.request("POST", CHAT, raw=b"{}", headers=kind)
        assert_error((status, found), 415, None, "expected application/json")
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.request("POST", CHAT, raw=b"{}", headers=headers)[0] == 400
    large = b'{"model": "demo", "user": "' + b"x" * 200_000 + b'"}'
    status, _, found = server.request("POST", CHAT, raw=large, headers=headers)
    assert_error((status, found), 413, None, "larger than 200.00 kB")
    pieces = (large[i : i + 9999] for i in range(0, len(large), 9999))  # sent in chunks
    status, _, found = server.request("POST", CHAT, raw=pieces, headers=headers)
    assert_error((status, found), 413, None, "larger than 200.00 kB")


def test_a_route_or_method_that_there_is_not(server):
    assert_error(server.post("/v1/chat", {}), 404, None, "/v1/chat", "no such route")
    assert_error(server.get(CHAT), 405, None, "GET", "POST")
    status, found = server.post("/v1/messages/nothing", {})
    assert status == 404 and found["type"] == "error"
    assert found["error"]["type"] == "not_found_error"


def test_what_takes_too_long_is_ended(engine):
    with served(engine, time_limit=0.3) as server:
        status, found = chat(server, max_tokens=4000, n=4)
        assert status == 504 and "--time-limit" in found["error"]["message"]
        _, _, raw = server.request(
            "POST", CHAT, {"model": "demo", "messages": HI, "max_tokens": 4000, "stream": True}
        )
        last = raw.decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "time_limit"
        assert still_answers(server)


def test_too_many_requests_are_told_to_come_again(engine):
    with served(engine, max_batch=1, max_queue=1) as server:
        statuses, headers = [], []

        def ask():
            body = {"model": "demo", "messages": HI, "max_tokens": 300}
            status, found, _ = server.request("POST", CHAT, body)
            statuses.append(status)
            headers.append(found)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        at = statuses.index(429)
        assert headers[at]["retry-after"] == "1"
        assert_error(chat(server, n=5), 400, "n", "5 texts", "at most 2")  # it would never fit
        assert still_answers(server)


def test_a_crowd_is_told_to_come_again_before_its_bodies_are_read(engine, monkeypatch):
    monkeypatch.setattr(app, "SPARE", 0)
    with served(engine, max_batch=1, max_queue=1) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(2)]
        for client in slow:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.2)
        assert server.get("/health")[0] == 200
        status, headers, found = server.request("POST", CHAT, {"model": "demo"})
        assert status == 503 and headers["retry-after"] == "1"
        assert "2 requests are being answered" in found["error"]["message"]
        for client in slow:
            client.close()
        time.sleep(0.2)
        assert still_answers(server)


@pytest.mark.parametrize(
    ("body", "published"), [(ChatBody, published_chat), (CompletionBody, published_completions)]
)
def test_every_field_that_the_client_knows_is_taken_or_refused_on_purpose(body, published):
    fields = {
        name
        for kind in vars(published).values()
        if isinstance(kind, type) and kind.__name__.startswith("CompletionCreateParams")
        for name in kind.__annotations__
    }
    assert len(fields) > 15
    assert fields <= set(body.model_fields)
