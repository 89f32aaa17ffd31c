"""OpenAI's responses API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..generation.batching.requests import GeneratedToken
from ..generation.options import Options
from ..validation import show
from .answering import Answering, prepare
from .errors import ApiError, as_api_error
from .limits import read_json
from .logprobs import TokenNames
from .openai_fields import checked
from .responses_events import ResponseEvents, usage
from .responses_requests import InputTokensBody, ResponsesBody
from .responses_store import ResponseStore, Stored
from .responses_turn import answered, listed_logprobs, messages_of, turn_of
from .service import Service
from .streams import EventStream, comment, data, while_waiting
from .turn import Message

PATH = "/v1/responses"


def routes(service: Service) -> list[Route]:
    """``/v1/responses``, with what was stored of them, and ``input_tokens``."""
    api = _Responses(service)
    return [
        Route(PATH, api.create, methods=["POST"]),
        Route(f"{PATH}/input_tokens", api.count, methods=["POST"]),
        Route(f"{PATH}/{{response_id}}", api.retrieve, methods=["GET"]),
        Route(f"{PATH}/{{response_id}}", api.delete, methods=["DELETE"]),
    ]


class _Responses:
    """The routes, with the responses that they store."""

    def __init__(self, service: Service):
        self._service, self._store = service, ResponseStore()
        self._names = TokenNames(service.engine.tokenizer)

    async def create(self, request: Request) -> Response:
        service = self._service
        body = checked(ResponsesBody, await read_json(request, service.settings))
        service.check_model(body.model)
        before = self._before(body)
        turn = turn_of(body, before)
        prepared = await prepare(service, turn, "input")
        wanted, tokens = body.max_output_tokens, len(prepared.tokens)
        most = service.max_tokens(tokens, wanted, "max_output_tokens" if wanted else "input")
        options = service.options(max_tokens=most, temp=body.temperature, top_p=body.top_p)
        listed = listed_logprobs(body)
        answering = Answering(service, prepared, options, turn.parallel, listed)
        conversation = [*before, *messages_of(body.input, before)]
        store = self._store if body.store is not False else None
        names = None if listed is None else self._names
        answer = _Answer(answering, _response(body, options), conversation, store, names)
        if body.stream:
            return EventStream(PATH, answering.running, answer.events(), named=True)
        whole = await while_waiting(request, answering.running, answer.whole())
        return JSONResponse(whole)

    async def count(self, request: Request) -> Response:
        body = checked(InputTokensBody, await read_json(request, self._service.settings))
        self._service.check_model(body.model)
        prepared = await prepare(self._service, turn_of(body, self._before(body)), "input")
        count = {"object": "response.input_tokens", "input_tokens": len(prepared.tokens)}
        return JSONResponse(count)

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(self._stored(request.path_params["response_id"]).response)

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        self._stored(response_id)
        self._store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    def _before(self, body: InputTokensBody) -> Sequence[Message]:
        """The conversation that the body goes on with."""
        if body.previous_response_id is None:
            return ()
        stored = self._store.get(body.previous_response_id)
        if stored is None:
            text = (
                f"previous_response_id: found {show(body.previous_response_id)}, expected a"
                " response that is stored here: the newest are, until the server ends."
            )
            code = "previous_response_not_found"
            raise ApiError(400, text, param="previous_response_id", code=code)
        return stored.messages

    def _stored(self, response_id: str) -> Stored:
        stored = self._store.get(response_id)
        if stored is None:
            raise ApiError(404, f"There is no stored response {show(response_id)}.")
        return stored


class _Answer:
    """One response, whole or as events.

    Args:
        answering: generates it.
        response: what is known of it before.
        conversation: what it answers.
        store: where it is kept; None: nowhere.
        names: of tokens, where their log-probabilities are wanted.
    """

    def __init__(
        self,
        answering: Answering,
        response: dict[str, Any],
        conversation: Sequence[Message],
        store: ResponseStore | None,
        names: TokenNames | None,
    ):
        self._answering, self._conversation, self._store = answering, conversation, store
        self._events, self._names = ResponseEvents(response), names

    async def whole(self) -> dict[str, Any]:
        """The response in one piece; raises what ends it."""
        async for _ in self._all():
            pass
        return self._events.response

    async def events(self) -> AsyncGenerator[str]:
        """The response as server-sent events; one that fails says so in the last."""
        for event in self._events.start():
            yield data(event, event["type"])
        try:
            async for more in self._all():
                yield comment("prompt") if more is None else data(more, more["type"])
        except Exception as error:
            for event in self._events.fail(as_api_error(error)):
                yield data(event, event["type"])

    async def _all(self) -> AsyncGenerator[dict[str, Any] | None]:
        """All events but the first, with None where one more chunk of the prompt is taken."""
        answering = self._answering
        async for progress in answering.progress():
            if not progress.tokens:
                yield None
                continue
            for made in self._events.feed(progress.deltas, self._logprobs(progress.tokens)):
                yield made
        incomplete = "max_output_tokens" if answering.reason == "length" else None
        last = self._events.finish(incomplete, usage(**answering.counts()))
        response = self._events.response
        if self._store is not None:
            messages = [*self._conversation, *answered(response["output"])]
            self._store.put(Stored(response, messages))
        for made in last:
            yield made

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> list[dict[str, Any]]:
        """Of the tokens, without one that only ends the text."""
        if (names := self._names) is None:
            return []
        return [
            names.chat(token)
            for token in tokens
            if not (token.finish_reason == "stop" and names.ends(token.token))
        ]


def _response(body: ResponsesBody, options: Options) -> dict[str, Any]:
    """What a response says of its request."""
    asked = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": asked.get("reasoning", {}),
        "store": body.store is not False,
        "temperature": options.temp,
        "text": asked.get("text") or {"format": {"type": "text"}},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": options.top_p,
        "truncation": "disabled",
        "metadata": body.metadata or {},
        "error": None,
        "incomplete_details": None,
        "usage": None,
    }
