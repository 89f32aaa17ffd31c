"""OpenAI's completions: texts that go on, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..generation.batching.requests import (
    GeneratedToken,
    GenerationRequest,
    PromptProgress,
    ScoredToken,
)
from ..generation.prompts import encode
from .limits import read_json
from .logprobs import TokenNames
from .openai_chat import DONE
from .openai_fields import MOST_TOP_LOGPROBS, Sampled, checked, misfit, only
from .running import Running
from .service import Service
from .streams import EventStream, Template, comment, data, while_waiting

USUAL_TOKENS = 16  # of OpenAI's API, where a request does not say
MOST_TEXTS = 128  # of all prompts together
Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """The prompts of a body: one or several, each a text or a list of tokens."""
    one = isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0]))
    prompts = [value] if one else value
    if isinstance(prompts, list) and 0 < len(prompts) <= MOST_TEXTS and all(map(_fits, prompts)):
        return prompts
    raise ValueError(
        f"expected a text, a list of tokens, or up to {MOST_TEXTS} of either, not empty"
    )


def _is_token(value: Any) -> bool:
    return type(value) is int


def _fits(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(map(_is_token, prompt))
    return isinstance(prompt, str)


class CompletionBody(Sampled):
    """A body of completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=MOST_TEXTS)
    suffix: Annotated[str | None, only("", because="the model does not fill gaps")] = None


def _check(body: CompletionBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise misfit("stream_options", "it needs stream: true")
    if body.best_of not in (None, body.choices):
        text = f"found {body.best_of} with n {body.choices}, expected as many as n"
        raise misfit("best_of", text)
    if len(body.prompt) * body.choices > MOST_TEXTS:
        texts = f"{len(body.prompt)} prompts with n {body.choices}"
        raise misfit("n", f"found {texts}, expected at most {MOST_TEXTS} texts")


def routes(service: Service) -> list[Route]:
    """``/v1/completions``."""
    names = TokenNames(service.engine.tokenizer)

    async def completions(request: Request) -> Response:
        body = checked(CompletionBody, await read_json(request, service.settings), _check)
        service.check_model(body.model)
        prompts = await service.prepare(lambda: _encoded(service, body.prompt), "prompt")
        running = service.start(_requests(service, body, prompts))
        call = _Completions(service, body, running, names)
        if body.stream:
            return EventStream(request.url.path, running, call.events())
        return JSONResponse(await while_waiting(request, running, call.whole()))

    return [Route("/v1/completions", completions, methods=["POST"])]


def _encoded(service: Service, prompts: list[Prompt]) -> list[list[int]]:
    model, tokenizer = service.engine.model, service.engine.tokenizer
    return [encode(model, tokenizer, prompt, raw=True) for prompt in prompts]


def _requests(
    service: Service, body: CompletionBody, prompts: list[list[int]]
) -> list[GenerationRequest]:
    found = []
    for tokens in prompts:
        field = "prompt" if body.max_tokens is None else "max_tokens"
        wanted = body.max_tokens or min(USUAL_TOKENS, service.engine.context - len(tokens))
        most = service.max_tokens(len(tokens), wanted, field)
        for choice in range(body.choices):
            options = body.options(service, most, choice)
            scores = bool(body.echo) and body.logprobs is not None
            found.append(GenerationRequest(tokens, options, body.logprobs, scores_prompt=scores))
    return found


class _Text:
    """One text as it grows, after the ``beginning`` that it repeats of its prompt."""

    def __init__(self, beginning: str, names: TokenNames | None):
        self._names, self._beginning, self._parts = names, beginning, [beginning]
        self._events = list[ScoredToken | GeneratedToken]()
        self._new = list[ScoredToken | GeneratedToken]()
        self._reason: str | None = None
        self._offset = 0

    def begin(self, event: PromptProgress) -> dict[str, Any] | None:
        """The choice of a chunk that repeats the prompt; None until all of it is taken."""
        self._new += event.scored
        if not self._beginning or event.done < event.total:
            return None
        return {"text": self._beginning, "logprobs": self._listed(), "finish_reason": None}

    def feed(self, tokens: Sequence[GeneratedToken]) -> list[dict[str, Any]]:
        """The choices of chunks: one of all tokens, or one of each that has log-probabilities."""
        if self._names is None:
            return self._chunk("".join([token.text for token in tokens]), tokens[-1])
        found = list[dict[str, Any]]()
        for token in tokens:
            if not (token.finish_reason == "stop" and self._names.ends(token.token)):
                self._new.append(token)
            found += self._chunk(token.text, token)
        return found

    def _chunk(self, text: str, last: GeneratedToken) -> list[dict[str, Any]]:
        """The choice of a chunk; none where nothing is ready to be shown."""
        self._parts.append(text)
        self._reason = last.finish_reason
        if not text and self._reason is None:
            return []
        return [{"text": text, "logprobs": self._listed(), "finish_reason": self._reason}]

    def _listed(self) -> dict[str, Any] | None:
        """The log-probabilities of what is new."""
        if self._names is None:
            return None
        logprobs = self._names.completion(self._new, self._offset)
        self._offset += sum(map(len, logprobs["tokens"]))
        self._events += self._new
        self._new = []
        return logprobs

    def choice(self) -> dict[str, Any]:
        """The whole text, as completions has it in ``choices``."""
        logprobs = None if self._names is None else self._names.completion(self._events, 0)
        text = "".join(self._parts)
        return {"text": text, "logprobs": logprobs, "finish_reason": self._reason}


class _Completions:
    """One call: its texts, whole or as events."""

    def __init__(self, service: Service, body: CompletionBody, running: Running, names: TokenNames):
        self._body, self._running = body, running
        listed = None if body.logprobs is None else names
        beginnings = [
            (prompt if isinstance(prompt, str) else service.engine.tokenizer.decode(prompt))
            if body.echo
            else ""
            for prompt in body.prompt
            for _ in range(body.choices)
        ]
        self._texts = [_Text(beginning, listed) for beginning in beginnings]
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> dict[str, Any]:
        """The texts in one piece."""
        async for index, found in self._running:
            if isinstance(found, PromptProgress):
                self._texts[index].begin(found)
            else:
                self._texts[index].feed(found)
        choices = [text.choice() | {"index": i} for i, text in enumerate(self._texts)]
        return self._common | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str]:
        """The texts as server-sent events."""
        more = [Template(partial(self._more, i)) for i in range(len(self._texts))]
        async for index, found in self._running:
            if isinstance(found, PromptProgress):
                yield comment(f"prompt {found.done}/{found.total}, {found.cached} at hand")
                if (piece := self._texts[index].begin(found)) is not None:
                    yield data(self._chunk(index, piece))
                continue
            for piece in self._texts[index].feed(found):
                plain = piece["logprobs"] is None and piece["finish_reason"] is None
                yield more[index](piece["text"]) if plain else data(self._chunk(index, piece))
        if self._body.includes_usage:
            yield data(self._common | {"choices": [], "usage": self._usage()})
        yield DONE

    def _more(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"text": text, "logprobs": None, "finish_reason": None})

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        rest = {"usage": None} if self._body.includes_usage else {}
        return self._common | {"choices": [choice | {"index": index}]} | rest

    def _usage(self) -> dict[str, Any]:
        counts = self._running.usage
        prompts = counts[:: self._body.choices]
        prompt, cached = sum(c.prompt for c in prompts), sum(c.cached for c in prompts)
        generated = sum(count.generated for count in counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
