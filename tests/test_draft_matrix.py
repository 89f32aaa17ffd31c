"""Texts of 500 tokens are the same, bit for bit, with drafts and without, in every setting.

Streamed experts and batches are compared with a text alone whose experts are all in memory, so no
setting is compared with itself. In memory each prompt has drafts of the layer at each depth, and
others beside them. Other settings have each depth, while prompts and sources take turns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest
from test_drafts import BITS, Planted, decode

import glm_fused
from glm_fused import Engine, EngineOptions
from glm_fused.formats.kv_rows import KV_FORMATS
from glm_fused.generation.batching.batches import generate_batch
from glm_fused.generation.batching.rows import Row
from glm_fused.generation.decoding import Drafting
from glm_fused.generation.drafts.options import DraftOptions
from glm_fused.generation.options import Options

pytestmark = pytest.mark.slow

TOKENS, PROMPTS = 500, 20
DEPTHS = (*range(1, 9), "auto")
SOURCES = ("mtp", "lookup", "mtp+lookup", "planted")
FORMATS = [name for name in KV_FORMATS if name != "auto"]
SLOTS = range(4, 17)  # of the bundled model's 16 experts a token chooses 4
BATCH = 4
BATCH_DEPTHS = (1, 2, 3, 8, "auto")  # a step of 4 texts has room for 3, which 8 comes down to


class Text(NamedTuple):
    """A prompt, what follows it, and the bits of the logits [tokens, vocabulary] behind that."""

    prompt: list[int]
    tokens: list[int]
    bits: mx.array


class Case(NamedTuple):
    """A text of `plain`, and the drafts for it."""

    prompt: int
    depth: int | str
    source: str


def turns(first, count):
    """Consecutive cases, of which any 36 have each depth with each source, and all prompts."""
    return [
        Case(n % PROMPTS, DEPTHS[n % len(DEPTHS)], SOURCES[n % len(SOURCES)])
        for n in range(first, first + count)
    ]


def prompts_of(engine):
    """Prompts of 200 to 1,150 characters of the package's own files."""
    files = sorted(Path(glm_fused.__file__).parent.rglob("*.py"), key=lambda f: -f.stat().st_size)
    texts = [file.read_text() for file in files[:PROMPTS]]
    return [engine.encode(text[100 * i : 150 * i + 200], raw=True) for i, text in enumerate(texts)]


@cache
def plain(kv_format):
    """The texts without drafts, with caches in a format."""
    with Engine("demo", EngineOptions(kv_format=kv_format)) as engine:
        decoded = [(p, decode(engine.model, p, tokens=TOKENS)) for p in prompts_of(engine)]
        return [Text(prompt, tokens, mx.stack(rows)) for prompt, (tokens, rows, _) in decoded]


def check(engine, texts, cases):
    """Each case has the text without drafts; of all drafts some stay, and some do not."""
    counts, model = Counter(), engine.model
    for case in cases:
        text, (_, depth, source) = texts[case.prompt], case
        if source == "planted":
            planted = Planted(text.prompt + text.tokens, 0.7, case.prompt)
            drafting = Drafting(planted, DraftOptions(depth).chooser(model))
        else:
            drafting = Drafting.of(DraftOptions(depth, source), model)
        tokens, rows, decoding = decode(model, text.prompt, drafting, tokens=TOKENS)
        assert tokens == text.tokens, case
        assert mx.array_equal(mx.stack(rows), text.bits), case
        count(counts, decoding.statistics.describe(None))
    assert 0 < counts["accepted"] < counts["proposed"]


def count(counts, found):
    counts.update(proposed=found["proposed"], accepted=found["accepted"])


def engine_with(**options):
    return Engine("demo", EngineOptions(draft="auto", draft_from="mtp", **options))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("sources", [SOURCES[:1], SOURCES[1:]], ids="+".join)
def test_in_memory(sources, depth):
    with engine_with() as engine:
        cases = [Case(i, depth, sources[i % len(sources)]) for i in range(PROMPTS)]
        check(engine, plain("auto"), cases)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_kv_formats(kv_format):
    with engine_with(kv_format=kv_format) as engine:
        check(engine, plain(kv_format), turns(0, len(DEPTHS) * len(SOURCES)))


@pytest.mark.parametrize("slots", SLOTS)
def test_streamed_experts(slots):
    with engine_with(slots=slots) as engine:
        check(engine, plain("auto"), turns(len(DEPTHS) * slots, len(DEPTHS)))
        assert engine.model.streaming.stats()["misses"] > 0


@pytest.fixture
def taken(monkeypatch):
    """The bits of the logits that tokens of a batch were chosen from, by the text's number."""
    found, take = defaultdict(list), Row._take

    def record(self, token, logits, at):
        found[id(self)].append(logits[at].view(BITS[logits.dtype.size]))
        take(self, token, logits, at)

    monkeypatch.setattr(Row, "_take", record)
    monkeypatch.setattr(Row, "needs_logits", True)  # so that it is given them
    return found


@pytest.mark.parametrize(
    "options", [{}, *({"kv_format": name} for name in FORMATS), {"slots": 4}, {"slots": 9}], ids=str
)
def test_batches_of_four(taken, monkeypatch, options):
    """In memory each batch at each depth, in other settings one batch at each."""
    texts, counts = plain(options.get("kv_format", "auto")), Counter()
    with engine_with(**options) as engine:
        monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", set())  # texts go on
        for i in range(PROMPTS // BATCH):
            several = texts[BATCH * i : BATCH * (i + 1)]
            for depth in (BATCH_DEPTHS[i],) if options else BATCH_DEPTHS:
                for source in SOURCES[:2]:
                    found = in_company(engine, several, DraftOptions(depth, source), taken)
                    count(counts, found.drafts)
    assert 0 < counts["accepted"] < counts["proposed"]


def in_company(engine, texts, drafts, taken):
    """Generate for several texts at once, each of which has to be what it is alone."""
    taken.clear()
    prompts, options = [text.prompt for text in texts], Options(max_tokens=TOKENS)
    found = generate_batch(engine.model, engine.tokenizer, prompts, options, drafts)
    for text, answer, rows in zip(texts, found.answers, taken.values(), strict=True):
        assert answer.tokens == text.tokens, drafts
        assert mx.array_equal(mx.stack(rows), text.bits), drafts
    return found
