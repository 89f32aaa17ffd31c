"""Which tokens may come next in an answer that follows a grammar, as llguidance has it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..foreign import foreign
from ..generation.batching.requests import Constraint
from .errors import ApiError

try:
    import llguidance
    import llguidance.hf
except ImportError:
    raise ImportError(
        "grammars need llguidance, which pip install 'glm-fused[serve]' brings."
    ) from None

# What a request can make a grammar cost, in llguidance's units; far above what schemas in use take.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,  # they would show requests in logs
)
MAX_GRAMMAR = 1 << 17  # characters


class Grammars:
    """Compiles grammars for one model's tokens.

    Args:
        tokenizer: the checkpoint's.
        vocabulary: how many logits the model has, of which tokens of the tokenizer are the first.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocabulary: int):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None

    def compile(self, lark: str, what: str) -> GrammarConstraint:
        """A constraint to texts of a grammar in llguidance's dialect of Lark.

        Raises ValueError, which begins with ``what`` and names the keyword where there is one, for
        a grammar that llguidance refuses or that is too large.
        """
        if len(lark) > MAX_GRAMMAR:
            raise ValueError(
                f"{what} makes a grammar of {len(lark)} characters, expected at most {MAX_GRAMMAR}."
            )
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        matcher = llguidance.LLMatcher(self.tokens, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ValueError(f"{what} makes no grammar: {_first_line(matcher.get_error())}")
        return GrammarConstraint(matcher, self._vocabulary, self._tokenizer.eos_token_ids)

    def mark(self, text: str) -> str:
        """How Lark names a mark such as ``</think>``: as text, or the control token that it is."""
        token = self._tokenizer.get_vocab().get(text)
        if token is not None and self.tokens.is_special_token(token):
            return f"<[{token}]>"
        return quoted(text)

    @property
    def tokens(self) -> llguidance.LLTokenizer:
        """The tokenizer as llguidance has it, which takes a second to make of a large one."""
        with self._lock:
            if self._tokens is None:
                with foreign("[grammar] llguidance does not take the tokenizer"):
                    self._tokens = llguidance.hf.from_tokenizer(
                        self._tokenizer._tokenizer,
                        n_vocab=self._vocabulary,
                        eos_token=sorted(self._tokenizer.eos_token_ids),
                    )
            return self._tokens


class GrammarConstraint:
    """A text follows a grammar; it may end where the grammar lets it, with any stop token.

    The grammar is that of a request, which gets an error (400) where no text can follow it.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int, ends: Iterable[int]):
        self._matcher, self._vocabulary, self._ends = matcher, vocabulary, sorted(ends)

    def allowed(self) -> mx.array:
        """Booleans [vocabulary].

        Raises ApiError where the grammar is too costly to go on, or nothing can follow.
        """
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        if self._matcher.is_error():
            raise _fails(_first_line(self._matcher.get_error()))
        mask[self._ends] = self._matcher.is_accepting()
        if not mask.any():
            raise _fails("no value that begins so fits")
        return mx.array(mask[: self._vocabulary])

    def accept(self, token: int) -> None:
        """Go on with a token; a stop token ends the text and changes nothing."""
        if token not in self._ends and not self._matcher.consume_token(token):
            raise ValueError(f"[grammar] token {token} came, which the grammar does not allow.")


class AfterThinking:
    """Leaves a model to think as it likes, without ending or calling, and then constrains it.

    Args:
        constraint: what holds after thinking.
        vocabulary: how many logits there are.
        start: the token that opens thinking; None: the prompt has opened it.
        end: the token that ends it.
        barred: tokens that may not come while it thinks.
    """

    def __init__(
        self,
        constraint: Constraint,
        vocabulary: int,
        start: int | None,
        end: int,
        barred: Iterable[int],
    ):
        self._constraint, self._start, self._end = constraint, start, end
        mask = np.ones(vocabulary, bool)
        mask[list(barred)] = False
        self._free = mx.array(mask)
        self._thinks = start is None

    def allowed(self) -> mx.array:
        """Booleans [vocabulary]: all but what is barred while the model thinks."""
        if self._thinks:
            return self._free
        allowed = self._constraint.allowed()
        if self._start is not None:
            allowed[self._start] = True
        return allowed

    def accept(self, token: int) -> None:
        """Go on with a token, which may begin or end thinking."""
        if self._thinks:
            self._thinks = token != self._end
        elif token == self._start:
            self._thinks = True
        else:
            self._constraint.accept(token)
        self._start = None


def _fails(why: str) -> ApiError:
    text = f"The answer cannot go on as its schema, or that of a tool, demands: {why}."
    return ApiError(400, text, code="schema_failed")


def quoted(text: str) -> str:
    """A text as a literal of Lark."""
    # Lark's strings have Python's escapes; JSON's are among them, but for `/`, which it leaves.
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]
