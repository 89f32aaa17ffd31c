"""A server with the live page whose model is a script: each message names what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from glm_fused.serve import page

MARKDOWN = """Here is a **function** with `code`:

```python
def area(width, height):
    # of a rectangle
    return width * height
```

1. It multiplies *two* numbers.
2. It has no side effects.

| width | height | area |
|---|---|---|
| 2 | 3 | 6 |

See [the documentation](https://example.com/) for more.
"""

HOSTILE = (
    '<img src=x onerror="window.owned = 1"><script>window.owned = 2</script>\n\n'
    "[a](javascript:window.owned=3) ![b](x) `<b>c</b>`\n\n```html\n</code></pre><svg onload="
    "'window.owned = 4'>\n```\n\n# <iframe srcdoc='<script>parent.owned = 5</script>'>"
)

THOUGHT = "First I look at what is asked. Then I **answer** it."

CALL = {"name": "get_weather", "arguments": '{"city": "Oslo", "unit": "celsius"}'}


class Script:
    """What the server does, changed by tests while it runs.

    Attributes:
        bodies: the requests for answers, as they came.
        key: what a client has to know.
        stats: what ``/stats`` answers; a function of the time since the start in seconds.
        cancelled: how many streams ended because their client left.
    """

    def __init__(self):
        self.bodies, self.key, self.cancelled = [], None, 0
        self.stats = example_stats

    def allows(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"


def create_app(script: Script) -> Starlette:
    began = time.monotonic()

    def refused() -> JSONResponse:
        return JSONResponse({"error": {"message": "The API key is missing."}}, 401)

    async def stats(request: Request):
        if not script.allows(request):
            return refused()
        return JSONResponse(script.stats(time.monotonic() - began))

    async def chat(request: Request):
        if not script.allows(request):
            return refused()
        body = await request.json()
        script.bodies.append(body)
        if "refuse" in str(body["messages"][-1]["content"]):
            error = {"message": "max_tokens is 9, expected 8.", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(watched(script, body), media_type="text/event-stream")

    own = [Route("/stats", stats), Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=[*own, *page.routes(None)])


async def watched(script: Script, body: dict) -> AsyncIterator[str]:
    try:
        if "long prompt" in str(body["messages"][-1]["content"]):
            yield ": prompt 1024/4096, 512 at hand\n\n"
            await asyncio.sleep(1)
        async for delta in answer(body["messages"]):
            yield f"data: {json.dumps(delta)}\n\n"
        yield "data: [DONE]\n\n"
    except Cut:
        return
    except asyncio.CancelledError:
        script.cancelled += 1
        raise


class Cut(Exception):
    """The stream breaks off."""


async def answer(messages: list[dict]) -> AsyncIterator[dict]:
    """Chunks, by the last message: think, tool, hostile, markdown, slow, cut, fail or another."""
    last = messages[-1]
    asked = str(last["content"])
    yield chunk({"role": "assistant", "content": ""})
    if "think" in asked:
        for piece in re.findall(r"\S+\s?", THOUGHT):
            yield chunk({"reasoning_content": piece})
            await asyncio.sleep(0.01)
    if "tool" in asked and last["role"] == "user":
        first = {"index": 0, "id": "call_1", "type": "function"}
        yield chunk(
            {"tool_calls": [{**first, "function": {"name": CALL["name"], "arguments": ""}}]}
        )
        for piece in (CALL["arguments"][:9], CALL["arguments"][9:]):
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        yield chunk({}, "tool_calls")
        yield usage(21)
        return
    text = {"hostile": HOSTILE, "markdown": MARKDOWN}.get(asked, f"You said {asked}.")
    if "slow" in asked:
        text = "word " * 2000
    for i in range(0, len(text), 7):
        yield chunk({"content": text[i : i + 7]})
        await asyncio.sleep(0.02 if "slow" in asked else 0.001)
        if i > 30 and "cut" in asked:
            raise Cut
        if i > 30 and "fail" in asked:
            yield {"error": {"message": "expert 7 of layer 3 cannot be read."}}
            return
    yield chunk({}, "stop")
    yield usage(len(text) // 4)


def chunk(delta: dict, finish: str | None = None) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


def usage(tokens: int) -> dict:
    counts = {"completion_tokens": tokens, "prompt_tokens": 1840}
    counts["prompt_tokens_details"] = {"cached_tokens": 1792}
    return {"id": "chatcmpl-1", "choices": [], "usage": counts}


def example_stats(seconds: float) -> dict:
    """Numbers of a large model whose experts are streamed, while three requests run."""
    wave = [30 + 12 * ((i * 7919) % 13) / 13 if i > 20 else 0.0 for i in range(120)]
    layers = []
    for i in range(3, 78):
        share = 0.5 + 0.48 * ((i * 37) % 29) / 29
        used = 8 * int(400 + 10 * seconds)
        hits = int(used * share)
        layers.append({"layer": i, "hit_rate": share, "hits": hits, "reads": used - hits})
    layers[-1] = {"layer": 77, "hit_rate": None, "hits": 0, "reads": 0}
    active = [
        {"id": "a", "phase": "prompt", "prompt_done": 6144, "prompt_total": 20480, "cached": 2048,
         "tokens": 0, "tokens_per_second": 0.0},
        {"id": "b", "phase": "generation", "prompt_done": 900, "prompt_total": 900, "cached": 896,
         "tokens": 214, "tokens_per_second": 20.4},
        {"id": "c", "phase": "generation", "prompt_done": 71, "prompt_total": 71, "cached": 0,
         "tokens": 1032, "tokens_per_second": 19.8},
    ]  # fmt: skip
    memory = {"weights": 17_400_000_000, "slots": 61_200_000_000, "kv": 5_300_000_000}
    memory |= {"prompt_cache": 8_000_000_000, "scratch": 1_100_000_000, "other": 640_000_000}
    return {
        "model": "glm-5.2-int4",
        "uptime_seconds": 9_240 + seconds,
        "active": active,
        "queued": 2,
        "max_batch": 16,
        "tokens_per_second": 40.2,
        "history": wave,
        "totals": {"requests": 271, "generated": 183_402, "prompt": 2_410_233, "cached": 2_010_000},
        "memory": memory,
        "experts": {"layers": layers, "slots": 96},
        "drafts": {"tokens_per_step": 1.84, "acceptance_rate": 0.81},
        "prompt_cache": {
            "asked": 48,
            "hits": 42,
            "asked_tokens": 96_000,
            "hit_tokens": 81_920,
            "put": 47,
            "evicted_blocks": 3,
            "prompts": 12,
            "blocks": 400,
            "tokens": 102_400,
            "bytes": 8_000_000_000,
            "limit_bytes": 12_000_000_000,
            "disk": {"bytes": 9_000_000_000, "limit_bytes": 64_000_000_000},
        },
    }


@contextlib.contextmanager
def running(app: Starlette, port: int = 0):
    """The address of an application that runs in a thread until the end of the block."""
    sock = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


if __name__ == "__main__":
    with running(create_app(Script())) as url:
        print(url, flush=True)
        threading.Event().wait()
