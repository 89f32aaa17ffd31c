"""OpenAI's chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..generation.batching.requests import GenerationRequest, PromptProgress
from .answers import AnswerParser
from .conversation import Prepared
from .limits import read_json
from .logprobs import TokenNames
from .openai_answer import ChatAnswer, usage
from .openai_chat_body import ChatBody, check_chat
from .openai_fields import checked
from .running import Running, Tokens
from .service import Service
from .streams import EventStream, Template, comment, data, while_waiting

DONE = "data: [DONE]\n\n"


def routes(service: Service) -> list[Route]:
    """``/v1/chat/completions``."""
    names = TokenNames(service.engine.tokenizer)

    async def chat(request: Request) -> Response:
        body = checked(ChatBody, await read_json(request, service.settings), check_chat)
        service.check_model(body.model)
        asked = body.conversation()

        def prepare() -> list[Prepared]:
            first = service.conversation.prepare(**asked)
            return [first, *(first.again() for _ in range(body.choices - 1))]

        prepared = await service.prepare(prepare, "messages")
        running = service.start(_requests(service, body, prepared))
        call = _Chat(service, body, running, [p.parser for p in prepared], names)
        if body.stream:
            return EventStream(request.url.path, running, call.events())
        return JSONResponse(await while_waiting(request, running, call.whole()))

    return [Route("/v1/chat/completions", chat, methods=["POST"])]


def _requests(
    service: Service, body: ChatBody, prepared: list[Prepared]
) -> list[GenerationRequest]:
    wanted, field = body.wanted_tokens
    tokens = prepared[0].tokens
    most = service.max_tokens(len(tokens), wanted, field if wanted else "messages")
    return [
        GenerationRequest(each.tokens, options, body.listed_logprobs, each.constraint)
        for i, each in enumerate(prepared)
        for options in [body.options(service, most, i)]
    ]


class _Chat:
    """One call: its answers, whole or as events."""

    def __init__(
        self,
        service: Service,
        body: ChatBody,
        running: Running,
        parsers: list[AnswerParser],
        names: TokenNames,
    ):
        self._body, self._running = body, running
        parallel = body.parallel_tool_calls is not False
        listed = names if body.logprobs else None
        self._answers = [ChatAnswer(parser, parallel, listed) for parser in parsers]
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for index, found in self._running:
            if not isinstance(found, PromptProgress):
                self._feed(index, found)
        choices = [answer.choice() | {"index": i} for i, answer in enumerate(self._answers)]
        object = {"object": "chat.completion", "choices": choices}
        return self._common | object | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[str]:
        """The answer as server-sent events."""
        more = [Template(partial(self._more, i)) for i in range(len(self._answers))]
        for i in range(len(self._answers)):
            yield data(self._chunk(i, {"delta": {"role": "assistant", "content": ""}}))
        async for index, found in self._running:
            if isinstance(found, PromptProgress):
                yield comment(f"prompt {found.done}/{found.total}, {found.cached} at hand")
                continue
            for piece in self._feed(index, found):
                if piece.keys() == {"delta"} and piece["delta"].keys() == {"content"}:
                    yield more[index](piece["delta"]["content"])
                else:
                    yield data(self._chunk(index, piece))
        if self._body.includes_usage:
            yield data(self._with({"choices": [], "usage": self._usage()}))
        yield DONE

    def _feed(self, index: int, tokens: Tokens) -> list[dict[str, Any]]:
        answer = self._answers[index]
        pieces = answer.feed(tokens)
        if answer.ended:
            self._running.end(index, answer.unused)
        return pieces

    def _more(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"delta": {"content": text}})

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        full = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None} | choice
        rest = {"usage": None} if self._body.includes_usage else {}
        return self._with({"choices": [full]} | rest)

    def _with(self, rest: dict[str, Any]) -> dict[str, Any]:
        return self._common | {"object": "chat.completion.chunk"} | rest

    def _usage(self) -> dict[str, Any]:
        reasoning = sum(answer.reasoning_tokens for answer in self._answers)
        return usage(self._running.usage, reasoning)
