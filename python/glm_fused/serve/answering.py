"""The next message of a conversation, as it is generated."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from ..generation.batching.requests import GeneratedToken, GenerationRequest, PromptProgress
from ..generation.options import Options
from .answers import Delta, ToolCallStart, joined
from .conversation import Prepared
from .running import Running, Tokens
from .service import Service
from .turn import Turn


async def prepare(service: Service, turn: Turn, param: str) -> Prepared:
    """The prompt of a conversation, and what its answer has to be like.

    Raises ApiError (400, about the field ``param``) for what the chat template does not take.
    """

    def make() -> Prepared:
        return service.conversation.prepare(
            turn.messages,
            turn.tools,
            turn.tool_choice,
            turn.template_args,
            turn.response_format,
            parallel_tool_calls=turn.parallel,
        )

    return await service.prepare(make, param)


@dataclass(frozen=True)
class Progress:
    """What some tokens add to the message; no token while the prompt is taken."""

    deltas: list[Delta]
    tokens: Sequence[GeneratedToken] = ()


class Answering:
    """Generates one message: iterate `progress` to its end, or cancel ``running``.

    Attributes:
        running: the request.
        calls: how many calls of tools the message has.
        reason: why it ended: "stop" or "length", and None before.
        stop_text: the stop text that it ended before; None where there was none.
    """

    def __init__(
        self,
        service: Service,
        prepared: Prepared,
        options: Options,
        parallel: bool = True,
        top_logprobs: int | None = None,
    ):
        """Begin; raises ApiError where the request is not taken."""
        self._parser, self._parallel = prepared.parser, parallel
        self._apart = top_logprobs is not None  # each token has something of its own to say
        self.calls = 0
        self.reason: str | None = None
        self.stop_text: str | None = None
        request = GenerationRequest(prepared.tokens, options, top_logprobs, prepared.constraint)
        self.running: Running = service.start([request])

    def counts(self) -> dict[str, int]:
        """Tokens so far: of the prompt, of these at hand, generated, and of these reasoning.

        Those of the last progress may be missing until there is another, or the end.
        """
        used = self.running.usage[0]
        return {
            "prompt": used.prompt,
            "cached": used.cached,
            "generated": used.generated,
            "reasoning": self._parser.reasoning_tokens,
        }

    async def progress(self) -> AsyncGenerator[Progress]:
        """What comes, until the message ends; raises ApiError where the request fails."""
        async for _, found in self.running:
            if isinstance(found, PromptProgress):
                yield Progress([])
                continue
            for progress in self._progress(found):
                yield progress

    def _progress(self, tokens: Tokens) -> Iterator[Progress]:
        """What tokens add, all together or each, up to where the message ends."""
        told, deltas = 0, list[Delta]()
        for i, token in enumerate(tokens, start=1):
            added = self._deltas(token)
            kept = self._allowed(added)
            deltas += kept
            ends = len(kept) < len(added)
            if self._apart or ends or i == len(tokens):
                yield Progress(joined(deltas), tokens[told:i])
                told, deltas = i, []
            if ends:
                self.reason = "stop"
                self.running.end(0, len(tokens) - i)
                return

    def _deltas(self, token: GeneratedToken) -> list[Delta]:
        deltas = list(self._parser.feed(token))
        if token.finish_reason is not None:
            self.reason, self.stop_text = token.finish_reason, token.stopped_by
            deltas.extend(self._parser.finish())
        return deltas

    def _allowed(self, deltas: list[Delta]) -> list[Delta]:
        """Those before a second call of a tool, where only one is wanted."""
        for i, delta in enumerate(deltas):
            if isinstance(delta, ToolCallStart):
                if self.calls and not self._parallel:
                    return deltas[:i]
                self.calls += 1
        return deltas
